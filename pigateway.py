#!/usr/bin/env python3
"""pigateway: every model you already have access to, through the APIs your tools already speak.

One file, standard library only, Python 3.9 or newer. Run it:

    python3 pigateway.py --port 4000

and point an OpenAI client at http://127.0.0.1:4000/v1 or an Anthropic client at http://127.0.0.1:4000.

Contents (`grep -n '^# §' pigateway.py`):

    §1 Constants            §7 Client protocols       §13 HTTP server
    §2 Errors               §8 Upstream protocols     §14 Log-ins
    §3 Logging, redaction   §9 Catalogue              §15 Configuration and CLI
    §4 Representation       §10 Credentials           §16 Catalogue data
    §5 Framing              §11 HTTP client
    §6 Normalisation        §12 Gateway

§1 to §9 open nothing and read no clock, environment or random number: bytes and dicts in, dicts and events out.

One request in twelve steps:

     1. `Server` accepts; one thread owns the connection. `Handler` reads the head and gives the request an id.
     2. Method and path pick a handler from `ROUTES` and a `ClientProtocol`; key checked, body read, bounded.
     3. `client.parse(data)` makes a `Request`; a bad shape is a `BadRequest` that names the field.
     4. `catalogue.resolve(name)` finds the `Model`: provider, protocol, limits, compat flags.
     5. `credentials.get(provider)` finds the `Credential`.
     6. The pair of protocols decides the lane: native (the body as it came) or translated.
     7. Translated: `normalise(request, model)` makes a request that this model can take and names what it cannot.
     8. `upstream.build(...)` makes a `Call`: a value, nothing is sent.
     9. `transport.open(call, scope)` sends it. Status 400 or above: `upstream.parse_error` makes a `GatewayError`.
    10. `lane.feed(data)` turns received bytes into bytes for the client: reader, settle, writer.
    11. The status line goes out with the first event, so that an early failure still is an HTTP error.
    12. The response goes back to the pool or is closed; one access line is logged.

To add a provider that speaks a known protocol: one row in `PROVIDERS` (§9) and its lines in `MODELS` (§16).
To add a wire format: one class in §8 and its entry in `UPSTREAM_PROTOCOLS`, or one in §7 and its path in `ROUTES`;
one transcript in the tests.
"""
from __future__ import annotations

import argparse
import base64
import binascii
import bisect
import codecs
import collections
import configparser
import contextlib
import datetime
import difflib
import email.utils
import errno
import functools
import hashlib
import hmac
import http
import http.client
import http.server
import ipaddress
import itertools
import json
import logging
import math
import operator
import os
import queue
import re
import secrets
import select
import shlex
import shutil
import signal
import socket
import socketserver
import struct
import subprocess
import sys
import textwrap
import threading
import time
import urllib.parse
import urllib.request
import zlib
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import (Any, Callable, Dict, FrozenSet, Iterable, Iterator, List, Mapping, NamedTuple, Optional, Sequence,
                    TextIO, Tuple, Type, Union)

__all__ = [
    "main", "start_server", "stop_server", "Config", "Gateway", "Server", "ClientProtocol", "UpstreamProtocol",
    "Request", "Message", "Text", "Thinking", "Image", "Document", "ToolCall", "ToolResult", "Tool", "ToolChoice",
    "Start", "PartStart", "PartDelta", "PartEnd", "Done", "Failed", "Reply", "Usage", "Model", "Provider", "Credential",
    "collect", "GatewayError",
]

# ======================================================================================================================
# §1 Constants
# ======================================================================================================================

VERSION = "0.1.0"
NAME = "pigateway"
USER_AGENT = f"{NAME}/{VERSION}"

KIB, MIB = 1024, 1024 * 1024
RECEIVE_BYTES = 64 * KIB          # one receive; large enough that a busy stream needs few system calls
MAX_HEAD_BYTES = 64 * KIB         # request line and headers, from either side
MAX_HEADERS = 200
MAX_EVENT_BYTES = 32 * MIB        # one server-sent event, or one whole provider answer
MAX_VECTORS_BYTES = 128 * MIB     # one provider answer of embeddings: 2048 of 3072 numbers, written out, are 80 MB
MAX_ERROR_BYTES = 64 * KIB        # a provider's error body; more is cut
MAX_MESSAGE_CHARS = 4000          # a provider's error text as shown to a client
BACKLOG = 1024                    # the default of 5 drops connections when a few hundred clients start at once

FRESH_S = 1.0                     # a connection made just before the end has so long to send its request
KEEP_ALIVE_S = 75.0               # an idle client connection is closed after this
HEAD_TIMEOUT_S = 30.0             # from the first byte of a request to the end of its head
POOL_IDLE_S = 55.0                # below the 60 s after which common servers close an idle connection
POOL_PER_HOST = 64
DRAIN_S = 0.05                    # wait for the end of a provider's answer whose last event has been seen
COMMAND_TIMEOUT_S = 10.0          # a "!command" that prints a key
COMMAND_CACHE_S = 300.0
RETRY_FIRST_S, RETRY_MOST_S = 0.5, 8.0    # pause before the first new try, doubled for each one more, and its limit
RETRY_BUDGET_S = 30.0             # nothing is tried again later than this after a request came, nor waited for beyond it
COOL_DOWN_S = 30.0                # a model that failed is tried last for so long, where others stand behind it
BEDROCK_PAGES = 20                # of inference profiles, at most
COPILOT_API_VERSION = "2026-06-01"
DISCOVERY_S = 300.0               # refresh of a server's own model list
DISCOVERY_RETRY_S = 15.0
DISCOVERY_TIMEOUT_S = 10.0        # for all servers together

EXIT_OK, EXIT_FAILURE, EXIT_CONFIG, EXIT_RUNNING = 0, 1, 2, 3
EXIT_MISSING = 127               # a program that is not there, as shells count it
EXIT_INTERRUPTED = 130           # by Ctrl-C, as shells count it

LEVELS = ("off", "minimal", "low", "medium", "high", "xhigh", "max")
LEVEL_ALIASES = {"none": "off", "disabled": "off", "disable": "off", "false": "off", "0": "off", "maximum": "max",
                 **{level: level for level in LEVELS}}
# Thinking budgets in tokens, both directions: what a level asks for, and the level that a budget amounts to.
LEVEL_BUDGETS = {"minimal": 1024, "low": 2048, "medium": 8192, "high": 16384, "xhigh": 16384, "max": 16384}
BUDGET_LEVELS = ((0, "off"), (2048, "low"), (8192, "medium"), (24576, "high"))
MIN_BUDGET = 1024                 # Anthropic: thinking.budget_tokens is at least 1024 and below max_tokens
DEFAULT_MAX_TOKENS = 16384        # Anthropic requires max_tokens; used when neither client nor catalogue names one

MAX_ITEMS = 100_000               # in one array of a request; Anthropic's limit for messages

LOOPBACK_HOSTS = frozenset({"127.0.0.1", "::1", "localhost", "::ffff:127.0.0.1"})
LOGGED_BYTES = MIB                # of each body in the conversation log; more is cut, and marked so
LOGGED_HEADERS = ("content-type", "content-length", "user-agent", "accept", "accept-encoding", "host")

log = logging.getLogger(NAME)
log.addHandler(logging.NullHandler())


# ======================================================================================================================
# §2 Errors
# ======================================================================================================================
#
#   GatewayError            500   message, code, param, retry_after (seconds)
#   ├─ BadRequest           400   ← ContextOverflow 400, ModelNotFound 404 ← NotSupported, RouteNotFound 404,
#   │                               MethodNotAllowed 405, RequestTimeout 408, Conflict 409, BodyTooLarge 413,
#   │                               UpgradeRefused 426,
#   │                               HeadTooLarge 431
#   ├─ Unauthorized         401   the client's key for us, or no key of ours for the provider ← LogInOver 401
#   ├─ Forbidden            403   a host, an origin or a subscription that may not be used; a provider's own 403
#   ├─ ShuttingDown         503   this process is stopping
#   └─ UpstreamError        502   ← CredentialRefused 502, RateLimited 429 ← QuotaExceeded, Overloaded 503,
#                                   UpstreamTimeout 504, UpstreamProtocolError 502, EmptyAnswer 502,
#                                   ProviderMisconfigured 502
#   ClientGone (apart)            nobody is left to tell; logged, never rendered
#   ConfigError (apart)           a file, variable or flag that cannot be used: exit status 2
#   LogInFailed, AuthFileError    a command cannot do what it was asked: exit status 1


class GatewayError(Exception):
    """A failure with an HTTP status. `code` is the machine-readable word, `param` the path of the field at fault."""

    status = 500
    code = "internal_error"
    retryable: Optional[bool] = None    # None: let the client's SDK decide by status
    unsupported = ""                    # the request's parameter that a provider does not take
    replacement = ""                    # and what it wants instead

    def __init__(self, message: str, *, code: Optional[str] = None, param: Optional[str] = None,
                 retry_after: Optional[float] = None, provider_reply: Optional[ProviderReply] = None) -> None:
        super().__init__(message)
        self.message = message
        self.named_code = code
        self.code = code or type(self).code
        self.param = param
        self.retry_after = retry_after
        self.provider_reply = provider_reply

    def again(self) -> GatewayError:
        """The same error anew, for one of several threads that hear of it: each adds its own traceback."""
        return type(self)(self.message, code=self.named_code, param=self.param, retry_after=self.retry_after)

    def hide(self, secret_values: Sequence[str]) -> None:
        """Takes secrets out of everything that a client or a log will see."""
        self.message, self.code = redact(self.message, secret_values), redact(self.code, secret_values)
        self.named_code = self.named_code and redact(self.named_code, secret_values)


class ProviderReply(NamedTuple):
    """A provider's error answer as it came, for a client of the same protocol."""

    status: int
    content_type: str
    body: bytes


class BadRequest(GatewayError):
    """The request cannot be served as it is; sending it again will not help."""

    status, code = 400, "invalid_value"


class ContextOverflow(BadRequest):
    """The prompt is longer than the model's context window."""

    code = "context_length_exceeded"


class ModelNotFound(BadRequest):
    """No usable provider has this model."""

    status, code = 404, "model_not_found"


class NotSupported(ModelNotFound):
    """The model is there, but cannot do what this path is for."""

    code = "unsupported_endpoint"


class RouteNotFound(BadRequest):
    """No such path."""

    status, code = 404, "endpoint_not_found"


class MethodNotAllowed(BadRequest):
    """The path exists, the method does not."""

    status, code = 405, "method_not_allowed"


class RequestTimeout(BadRequest):
    """The client took too long to send its request."""

    status, code = 408, "request_timeout"


class Conflict(BadRequest):
    """A provider's 409."""

    status, code = 409, "conflict"


class BodyTooLarge(BadRequest):
    """The body is over our limit, or over the provider's."""

    status, code = 413, "request_body_too_large"


class UpgradeRefused(BadRequest):
    """The client wants to speak another protocol on this connection."""

    status, code = 426, "upgrade_refused"


class HeadTooLarge(BadRequest):
    """The request line and headers are over our limit."""

    status, code = 431, "headers_too_large"


class Unauthorized(GatewayError):
    """The client's key for this gateway is missing or wrong, or there is no key for the provider."""

    status, code = 401, "invalid_api_key"


class LogInOver(Unauthorized):
    """A subscription's log-in is missing, expired or revoked: only its owner can help. `reason` is the vendor's."""

    code = "no_credentials"
    reason = ""


class Forbidden(GatewayError):
    """Understood and refused."""

    status, code = 403, "forbidden"


class ShuttingDown(GatewayError):
    """This process is stopping and ends what is still open."""

    status, code = 503, "shutting_down"


class UpstreamError(GatewayError):
    """The provider failed."""

    status, code = 502, "provider_error"


class CredentialRefused(UpstreamError):
    """The provider refused our key. Not a 401: the client's own key is fine and must not be thrown away."""

    code = "upstream_auth_failed"
    retryable = False


class RateLimited(UpstreamError):
    """The provider asks for a pause."""

    status, code = 429, "rate_limit_exceeded"


class QuotaExceeded(RateLimited):
    """The account behind our key has nothing left; waiting seconds does not help."""

    code = "insufficient_quota"
    retryable = False


class Overloaded(UpstreamError):
    """The provider has no capacity now."""

    status, code = 503, "server_is_overloaded"


class UpstreamTimeout(UpstreamError):
    """The provider did not answer in time, or fell silent."""

    status, code = 504, "upstream_timeout"


class UpstreamProtocolError(UpstreamError):
    """The provider's answer is cut or malformed."""

    code = "stream_incomplete"


class ProviderMisconfigured(UpstreamError):
    """What stands at the provider's address is not what the configuration says; trying again will not help."""

    retryable = False


class EmptyAnswer(UpstreamError):
    """A regular answer with nothing in it, a passing fault of Gemini's: sent again, the request mostly succeeds."""

    code = "empty_answer"


class ClientGone(Exception):
    """The client closed its connection."""


class ConfigError(Exception):
    """A configuration that cannot be used; the message names the file, variable or flag."""


class LogInFailed(Exception):
    """A log-in that came to nothing; the message says why."""


class AuthFileError(Exception):
    """auth.json, or its lock, cannot be used; the message says why."""


# ======================================================================================================================
# §3 Logging and redaction
# ======================================================================================================================

_KEY_PREFIXES = ("sk", "pk", "rk", "gsk", "xai", "hf", "ghp", "gho", "ghu", "ghs", "r8", "nvapi", "fw", "csk", "tgp")
# (what the text must hold, in small letters, for the pattern to be worth a try; the pattern). Megabytes of text without
# keys are what passes here, so a pattern without such a word begins with letters: `re` looks for those much faster.
_SECRET_PATTERNS = tuple((words, re.compile(pattern)) for words, pattern in (
    (("bearer ",), r"(?i)(?<=bearer )\s*[A-Za-z0-9._~+/=-]{6,}"),
    (tuple(prefix + dash for prefix in _KEY_PREFIXES for dash in "-_"),
     rf"\b(?:{'|'.join(_KEY_PREFIXES)})[-_][A-Za-z0-9_-]{{12,}}"),
    (("",), r"AIza(?<=\bAIza)[A-Za-z0-9_-]{20,}"),
    (("",), r"ya29\.(?<=\bya29\.)[A-Za-z0-9._-]{10,}"),
    (("",), r"AKIA(?<=\bAKIA)[A-Z0-9]{16}\b"),
    (("",), r"ASIA(?<=\bASIA)[A-Z0-9]{16}\b"),
    (("",), r"eyJ(?<=\beyJ)[A-Za-z0-9_-]{8,}(?:\.[A-Za-z0-9_-]*){0,2}"),
    (("key=",), r"(?i)(?<=[?&]key=)[^&\s\"']+"),
    (("key=",), r"(?i)(?<=[?&]api_key=)[^&\s\"']+"),
))
REDACTED = "[redacted]"


def redact(text: str, secret_values: Iterable[str] = ()) -> str:
    """`text` without the given values and without anything of the shape of a key or token."""
    for value in secret_values:
        if len(value) >= 4:
            text = text.replace(value, REDACTED)
    small = text.lower()
    for words, pattern in _SECRET_PATTERNS:
        if any(word in small for word in words):
            text = pattern.sub(REDACTED, text)
    return text


def redact_strings(value: Any, secret_values: Sequence[str]) -> Any:
    """`redact` for every string inside a JSON value."""
    if isinstance(value, str):
        return redact(value, secret_values)
    if isinstance(value, list):
        return [redact_strings(item, secret_values) for item in value]
    if isinstance(value, dict):
        return {redact(key, secret_values): redact_strings(item, secret_values) for key, item in value.items()}
    return value


def redact_body(body: bytes, secret_values: Sequence[str]) -> bytes:
    """A provider's error body without secrets, also where JSON escapes hide them; as it came when there are none."""
    try:
        value = json.loads(body)
        hidden = redact_strings(value, secret_values)
        return body if hidden == value else json.dumps(hidden).encode("ascii")
    except (ValueError, RecursionError):
        text = body.decode("utf-8", "replace")
        hidden_text = redact(text, secret_values)
        return body if hidden_text == text else hidden_text.encode("utf-8")


HIDDEN = "[REDACTED]"               # in place of the value of a name that says it is secret, as piai-router has it
_SECRET_NAME = re.compile(r"(?i)authorization|api[-_]?key|secret|passw(?:or)?d|private[-_]?key|ssh[-_]?key|"
                          r"session[-_]?id|cookie")
# Tokens are counted (max_tokens, inputTokens, TOTAL_TOKENS, token_count: 7) unless somebody is let in by them.
_TOKEN_NAME = re.compile(r"(?i:access|refresh|auth|bearer|session)[-_]?(?i:token)|[tT]oken(?!s)|TOKEN(?!S)")
# Such a name with its text in JSON that itself is text: arguments of tools, or a body that was cut; also one level
# deeper.
_NAMED_TEXT = re.compile(r'"([^"\\]{1,64})"(\s*:\s*)"(?:[^"\\]|\\.)*(?:"|\\?\Z)', re.DOTALL)
_NAMED_TEXT_WITHIN = re.compile(
    r'\\"([^"\\]{1,64})\\"(\s*:\s*)\\"(?:[^"\\]|\\\\(?:\\")?|\\[^"\\])*(?:\\"|\\?\Z)', re.DOTALL)


def names_secret(name: str, value: Any) -> bool:
    """Whether the value of a JSON object's key is secret by its name."""
    if value is None or isinstance(value, bool):
        return False
    return bool(_SECRET_NAME.search(name) or not isinstance(value, (int, float)) and _TOKEN_NAME.search(name))


def hide_text(text: str, secret_values: Sequence[str]) -> str:
    """`redact`, and without the values of secret names where the text is JSON."""
    if '":' in text or '" :' in text:
        for pattern, quote in ((_NAMED_TEXT, '"'), (_NAMED_TEXT_WITHIN, '\\"')):
            text = pattern.sub(lambda match: f"{quote}{match[1]}{quote}{match[2]}{quote}{HIDDEN}{quote}"
                               if names_secret(match[1], "") else match[0], text)
    return redact(text, secret_values)


def hide_secrets(value: Any, secret_values: Sequence[str]) -> Any:
    """A JSON value for the log files: nothing under a secret name, and `hide_text` for every string."""
    if isinstance(value, str):
        return hide_text(value, secret_values)
    if isinstance(value, list):
        return [hide_secrets(item, secret_values) for item in value]
    if isinstance(value, dict):
        return {redact(name, secret_values): HIDDEN if names_secret(name, item) else hide_secrets(item, secret_values)
                for name, item in value.items()}
    return value


def hide_body(body: bytes, secret_values: Sequence[str]) -> Any:
    """A body for the log files: a JSON value, or else text, cut or not."""
    text = body.decode("utf-8", "replace")
    try:
        return hide_secrets(loads(text), secret_values)
    except (ValueError, RecursionError):
        return hide_text(text, secret_values)


def quoted_forms(secret_values: Iterable[str]) -> List[str]:
    """Each value as it is and as it stands in JSON."""
    return list(dict.fromkeys(form for value in secret_values for form in (value, json.dumps(value)[1:-1])))


def iso_time(seconds: float) -> str:
    """A time in epoch seconds as ISO 8601, UTC."""
    return time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(seconds)) + f".{int(seconds * 1000) % 1000:03d}Z"


class JsonFormatter(logging.Formatter):
    """One JSON object a line: level, ts (ISO 8601, UTC), msg, then the record's own `fields`; `secret_values` are blanked
    out wherever they stand."""

    def __init__(self, secret_values: Sequence[str] = ()) -> None:
        super().__init__()
        self._secret_values = quoted_forms(secret_values)

    def format(self, record: logging.LogRecord) -> str:
        line: Dict[str, Any] = {"level": record.levelname.lower().replace("warning", "warn"),
                                "ts": iso_time(record.created), "msg": record.getMessage()}
        line.update(getattr(record, "fields", {}))
        if record.exc_info:
            line["trace"] = self.formatException(record.exc_info)
        return redact(json.dumps(line, default=str), self._secret_values)


# ======================================================================================================================
# §4 Representation
# ======================================================================================================================
#
# What a conversation is, whoever speaks: client protocols parse into it and render from it, upstream protocols build
# from it and read into it. `None` means "the client did not say", and then nothing is sent.


@dataclass(frozen=True)
class Text:
    """Visible text."""

    text: str = ""


@dataclass(frozen=True)
class Thinking:
    """A model's reasoning. `signature` is its maker's opaque seal (or the whole content, when `redacted`), to be given
    back byte for byte to that maker and nobody else; `maker` is the wire protocol that issued it, `origin` the model and
    account (see `origin_of`), "" when that is not known."""

    text: str = ""
    signature: Optional[str] = None
    redacted: bool = False
    maker: str = ""
    origin: str = ""


@dataclass(frozen=True)
class Image:
    """A picture: base64 `data` with its media type, or an http(s) `url`."""

    media_type: str = ""
    data: Optional[str] = None
    url: Optional[str] = None
    detail: Optional[str] = None


@dataclass(frozen=True)
class Document:
    """A file, PDF as a rule: base64 `data` with its media type, or an http(s) `url`."""

    media_type: str = "application/pdf"
    data: Optional[str] = None
    url: Optional[str] = None
    name: Optional[str] = None


@dataclass(frozen=True)
class ToolCall:
    """A call that the model asks for. `arguments` is JSON text exactly as the model wrote it, valid or not; `signature`,
    `maker` and `origin` are as in `Thinking`, for providers that seal calls too."""

    id: str
    name: str
    arguments: str = ""
    signature: Optional[str] = None
    maker: str = ""
    origin: str = ""


@dataclass(frozen=True)
class ToolResult:
    """What the client's tool gave back."""

    call_id: str
    parts: Tuple[Part, ...] = ()
    is_error: bool = False


Part = Union[Text, Thinking, Image, Document, ToolCall, ToolResult]


@dataclass(frozen=True)
class Message:
    """One turn; role is user, assistant, tool (only `ToolResult` parts) or system (later in a conversation)."""

    role: str
    parts: Tuple[Part, ...]


@dataclass(frozen=True)
class Tool:
    """A function that the model may call; `schema` is the JSON Schema of its arguments. A `custom` tool takes free text
    and travels as a function with the single string property `input`. `path` is what the client calls a tool that it
    has put into a namespace: that namespace, and the tool's name there."""

    name: str
    description: Optional[str] = None
    schema: Mapping[str, Any] = field(default_factory=lambda: {"type": "object", "properties": {}})
    strict: Optional[bool] = None
    custom: bool = False
    path: Tuple[str, ...] = ()


class ToolChoice(NamedTuple):
    """kind is auto, none, required or tool (then `name`)."""

    kind: str
    name: Optional[str] = None


class Reasoning(NamedTuple):
    """How hard to think: a level of `LEVELS`, and the budget in tokens when the client named one."""

    level: str
    budget: Optional[int] = None


class OutputFormat(NamedTuple):
    """Structured output: any JSON object (`schema` None) or one that fits a JSON Schema."""

    schema: Optional[Mapping[str, Any]] = None
    name: str = "output"
    strict: Optional[bool] = None


@dataclass(frozen=True)
class Request:
    """What the client asked for. `extra` holds fields that only its own protocol knows, `lost` the paths of what the
    representation cannot hold, `refused` those (path, reason) whose loss would change the answer: all three matter only
    when the request is translated. `images` are the paths of its images, `session` is what the client calls the
    conversation. `data`, `body`, `headers` and `query` are the request as it came, for the native lane; `seals` are
    the signatures in it that no part holds, `foreign` those that must not go out."""

    model: str
    messages: Tuple[Message, ...]
    system: Tuple[Text, ...] = ()
    tools: Tuple[Tool, ...] = ()
    tool_choice: Optional[ToolChoice] = None
    parallel_tools: Optional[bool] = None
    max_tokens: Optional[int] = None
    temperature: Optional[float] = None
    top_p: Optional[float] = None
    top_k: Optional[int] = None
    stop: Tuple[str, ...] = ()
    seed: Optional[int] = None
    frequency_penalty: Optional[float] = None
    presence_penalty: Optional[float] = None
    logit_bias: Optional[Mapping[str, Any]] = None
    reasoning: Optional[Reasoning] = None
    output: Optional[OutputFormat] = None
    user: Optional[str] = None
    verbosity: Optional[str] = None
    stream: bool = False
    include_usage: bool = False
    protocol: str = ""
    extra: Mapping[str, Any] = field(default_factory=dict)
    lost: Tuple[str, ...] = ()
    refused: Tuple[Tuple[str, str], ...] = ()
    images: Tuple[str, ...] = ()
    session: str = ""
    data: Mapping[str, Any] = field(default_factory=dict, repr=False, compare=False)
    body: bytes = field(default=b"", repr=False, compare=False)
    headers: Mapping[str, str] = field(default_factory=dict, repr=False, compare=False)
    query: str = field(default="", repr=False, compare=False)
    seals: Tuple[str, ...] = field(default=(), repr=False, compare=False)
    foreign: FrozenSet[str] = field(default=frozenset(), repr=False, compare=False)


class Usage(NamedTuple):
    """Tokens. `input` leaves out both cache counts; `output` includes `reasoning`; `cache_write_1h` is part of
    `cache_write`."""

    input: int = 0
    output: int = 0
    cache_read: int = 0
    cache_write: int = 0
    reasoning: int = 0
    cache_write_1h: int = 0

    @property
    def prompt(self) -> int:
        """All input tokens, cached or not."""
        return self.input + self.cache_read + self.cache_write


# Events are named tuples rather than dataclasses: a stream makes one for every few bytes of text, and these cost a third.


class Start(NamedTuple):
    """The answer begins; first event. `usage` is what the provider knows of the prompt by then."""

    id: str = ""
    model: str = ""
    usage: Optional[Usage] = None


class PartStart(NamedTuple):
    """Part `index` (0, 1, 2 … without gaps) begins; `part` has its type, and for a tool call its id and name."""

    index: int
    part: Part


class PartDelta(NamedTuple):
    """More text, thinking or arguments of part `index`. Parts may take turns."""

    index: int
    text: str


class PartEnd(NamedTuple):
    """Part `index` is complete; `part` is the whole of it, so that a writer need not keep text."""

    index: int
    part: Part


class Done(NamedTuple):
    """The answer is complete. stop_reason: stop, length, tool_use, stop_sequence, refusal, pause or overflow; `detail`
    is the stop sequence that matched, or a refusal's explanation."""

    stop_reason: str
    usage: Usage = Usage()
    detail: Optional[str] = None


class Failed(NamedTuple):
    """The answer broke; last event instead of `Done`."""

    error: GatewayError


Event = Union[Start, PartStart, PartDelta, PartEnd, Done, Failed]


@dataclass(frozen=True)
class Reply:
    """A whole answer: what `collect` makes of its events."""

    id: str
    parts: Tuple[Part, ...]
    stop_reason: str
    usage: Usage
    detail: Optional[str] = None


def collect(events: Iterable[Event]) -> Reply:
    """The reply that a finished run of events amounts to; raises the error of a failed one."""
    parts: Dict[int, Part] = {}
    reply_id = ""
    for event in events:
        if isinstance(event, PartEnd):
            parts[event.index] = event.part
        elif isinstance(event, Start):
            reply_id = event.id
        elif isinstance(event, Done):
            ordered = tuple(parts[index] for index in sorted(parts))
            return Reply(reply_id, ordered, event.stop_reason, event.usage, event.detail)
        elif isinstance(event, Failed):
            raise event.error
    raise UpstreamProtocolError("the provider's answer ended early")


@dataclass(frozen=True)
class Provider:
    """A row of the provider table. `endpoints`: protocol name → base URL, the first is the default of its models.
    `env`: names of variables that may hold its key. `models`: the provider whose catalogue lines it shares. `auth`: the
    header its key goes into, when not its protocol's own. `source`: where else its credential comes from."""

    name: str
    endpoints: Mapping[str, str]
    env: Tuple[str, ...] = ()
    headers: Mapping[str, str] = field(default_factory=dict)
    compat: Mapping[str, Any] = field(default_factory=dict)
    discover: bool = False
    models: str = ""
    auth: str = ""
    source: str = ""
    keyless: bool = False
    auth_header: bool = False
    api_key: Optional[str] = field(default=None, repr=False)
    auth_file: str = ""         # another auth.json for its log-in,
    log_in: str = ""            # and another name for the entry there

    @property
    def protocol(self) -> str:
        """The default protocol of its models."""
        return next(iter(self.endpoints))


@dataclass(frozen=True)
class Model:
    """A model of a provider. `context_window` and `max_tokens` in tokens, 0 when unknown; `input` is None when it is
    unknown whether it takes images; `cost` in USD per million tokens: input, output, cache read, cache write."""

    id: str
    provider: str
    protocol: str
    base_url: str
    name: str = ""
    context_window: int = 0
    max_tokens: int = 0
    input: Optional[Tuple[str, ...]] = None
    reasoning: Optional[bool] = None
    cost: Tuple[float, ...] = ()
    thinking_levels: Mapping[str, Optional[str]] = field(default_factory=dict)
    compat: Mapping[str, Any] = field(default_factory=dict)
    headers: Mapping[str, str] = field(default_factory=dict)
    sampling: Mapping[str, Any] = field(default_factory=dict)
    level: Optional[str] = None
    alias: str = ""

    @property
    def full_id(self) -> str:
        """The id that tells it from all others: provider/id."""
        return f"{self.provider}/{self.id}"

    @property
    def listed_id(self) -> str:
        """The id that the gateway lists."""
        return self.alias or self.full_id

    def flag(self, name: str, default: Any = None) -> Any:
        """The compat flag, or its default."""
        return self.compat.get(name, default)


@dataclass(frozen=True)
class Credential:
    """What authorises a call: kind is api_key, oauth, client (what the client brought, in its own header) or none.
    `parts` are its further pieces by name, where a provider wants more than one (key pairs, projects, regions). `account`
    tells accounts apart without naming them; `is_passed`: it is the client's own, not ours."""

    kind: str = "none"
    token: str = field(default="", repr=False)
    headers: Mapping[str, str] = field(default_factory=dict, repr=False)
    parts: Mapping[str, str] = field(default_factory=dict, repr=False)
    account: str = ""
    is_passed: bool = False

    @property
    def secrets(self) -> List[str]:
        """Every value that must not show up in a log or an error."""
        parts = (value for name, value in self.parts.items() if name in SECRET_PARTS)
        return [value for value in (self.token, *self.headers.values(), *parts) if len(value) >= 8]


NAMING_FIELDS = ("accountId", "projectId", "email")     # of a log-in's entry: whose it is
SECRET_PARTS = ("access_key_id", "secret_access_key", "session_token", *NAMING_FIELDS)


class Call(NamedTuple):
    """An HTTP request to a provider: a value, nothing is sent."""

    method: str
    url: str
    headers: Mapping[str, str]
    body: bytes = b""


def present(**fields: Any) -> Dict[str, Any]:
    """The fields that are not None."""
    return {name: value for name, value in fields.items() if value is not None}


# ======================================================================================================================
# §5 Framing
# ======================================================================================================================
#
# Bytes ↔ messages. Boundaries between reads mean nothing here: every decoder keeps its tail.

# ASCII output on purpose: it needs no thought about lone surrogates, and U+2028, U+2029 and U+0085, at which some
# clients split lines inside an event, travel escaped. One kept encoder: json.dumps with options builds one per call.
dumps: Callable[[Any], str] = json.JSONEncoder(separators=(",", ":"), allow_nan=False).encode


def _finite(text: str) -> float:
    value = float(text)
    if math.isinf(value):
        raise ValueError(f"number out of range: {text[:20]}")
    return value


def _reject_constant(name: str) -> Any:
    raise ValueError(f"{name} is not JSON")


# json accepts NaN, Infinity and 1e999, which no JSON writer may write again.
loads: Callable[[str], Any] = json.JSONDecoder(parse_float=_finite, parse_constant=_reject_constant).decode

_SURROGATE = re.compile("[\ud800-\udfff]")
_ESCAPED_SURROGATE = re.compile(rb"\\u[dD][89a-fA-F]")


def clean_text(text: str) -> str:
    """`text` with surrogate pairs joined and lone surrogates, which have no UTF-8, left out."""
    if not _SURROGATE.search(text):
        return text
    return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "ignore")


def clean_strings(value: Any) -> Any:
    """`clean_text` for every string inside a JSON value."""
    if isinstance(value, str):
        return clean_text(value)
    if isinstance(value, list):
        return [clean_strings(item) for item in value]
    if isinstance(value, dict):
        return {clean_text(key): clean_strings(item) for key, item in value.items()}
    return value


def parse_json_object(body: bytes) -> Dict[str, Any]:
    """A request body as a dict. Raises `BadRequest`, code invalid_json, that says where it stops being JSON."""
    if body.startswith(b"\xef\xbb\xbf"):
        body = body[3:]
    try:
        value = loads(body.decode("utf-8"))
        if _ESCAPED_SURROGATE.search(body):
            value = clean_strings(value)
    except UnicodeDecodeError as error:
        raise BadRequest(f"the body is not UTF-8: byte {error.start} is invalid", code="invalid_json") from None
    except json.JSONDecodeError as error:
        raise BadRequest(f"the body is not JSON: {error.msg} at line {error.lineno}, column {error.colno}",
                         code="invalid_json") from None
    except RecursionError:
        raise BadRequest("the body is nested too deeply", code="invalid_json") from None
    except ValueError as error:
        raise BadRequest(f"the body is not JSON: {error}", code="invalid_json") from None
    if not isinstance(value, dict):
        raise BadRequest("the body must be a JSON object", code="invalid_json")
    return value


_FENCE = re.compile(r"\A\s*(?:```[a-zA-Z0-9]*\s*)?")
_BAD_ESCAPE = re.compile(r'\\(?!["\\/bfnrtu])')
# What shows that an object was closed too early, or that it is not the only one.
_CONTINUES = re.compile(r'^\s*[,:"\[]|\{|"\s*:')
_lenient_decoder = json.JSONDecoder(strict=False, parse_float=_finite, parse_constant=_reject_constant)


def repair_json_object(text: str) -> Optional[Dict[str, Any]]:
    """The object that a model's tool arguments amount to, None when that is not clear.

    Blank text is {}. Mended: raw control characters in strings, invalid escapes, a code fence around it or at its
    beginning, words behind the object, an object written as a string. Cut or otherwise broken text is not completed
    by guessing."""
    value = _leading_value(text)
    if isinstance(value, str):                  # encoded twice
        value = _leading_value(value)
    return value if isinstance(value, dict) else None


def _leading_value(text: str) -> Any:
    """The JSON value that `text` begins with, None when there is none or the text goes on as JSON."""
    if not text.strip():
        return {}
    text = _FENCE.sub("", text)
    for mend in (str, lambda broken: _BAD_ESCAPE.sub(r"\\\\", broken)):
        try:
            mended = mend(text)
            value, end = _lenient_decoder.raw_decode(mended)
        except (ValueError, RecursionError):
            continue
        return None if _CONTINUES.search(mended[end:]) else value
    return None


def _blank(match: re.Match[str]) -> str:
    return match.group(0) if match.group(0).startswith('"') else " " * len(match.group(0))


def blank_json_comments(text: str) -> str:
    """JSON with `//` comments, as our own files may have them, made plain JSON of the same length."""
    return re.sub(r'"(?:\\.|[^"\\\n])*"|//[^\n]*', _blank, text.lstrip("\ufeff"))


def strip_json_comments(text: str) -> str:
    """JSON with `//` comments and trailing commas, as pi allows in models.json, made plain JSON of the same length."""
    return re.sub(r'"(?:\\.|[^"\\\n])*"|,(?=\s*[}\]])', _blank, blank_json_comments(text))


_HEADER_LINE = re.compile(rb"([!#$%&'*+.^_`|~0-9A-Za-z-]+):[ \t]*([^\0\r\n]*?)[ \t]*")


def parse_head(head: bytes) -> Tuple[str, Dict[str, str]]:
    """The start line and the headers (names in lower case, repeated ones joined by commas) of an HTTP/1 message head
    without its blank line. Raises ValueError for what RFC 9112 forbids: folded lines, blanks before the colon, stray
    CR, LF or NUL, and differing Content-Length values."""
    lines = head.split(b"\r\n")
    if len(lines) > MAX_HEADERS + 1:
        raise ValueError("too many headers")
    headers: Dict[str, str] = {}
    for line in lines[1:]:
        match = _HEADER_LINE.fullmatch(line)
        if not match:
            raise ValueError("malformed header line")
        name, value = match.group(1).decode("ascii").lower(), match.group(2).decode("latin-1")
        if name not in headers:
            headers[name] = value
        elif name in ("content-length", "host", "transfer-encoding"):
            raise ValueError(f"repeated {name} header")
        else:
            headers[name] += ", " + value
    if b"\r" in lines[0] or b"\n" in lines[0] or b"\0" in lines[0]:
        raise ValueError("malformed start line")
    return lines[0].decode("latin-1"), headers


def body_length(headers: Mapping[str, str]) -> Optional[int]:
    """Bytes of the body, None when it is chunked, -1 when no header says. Raises ValueError when it cannot be told."""
    coding = headers.get("transfer-encoding")
    length = headers.get("content-length")
    if coding is not None:
        if coding.lower() != "chunked" or length is not None:
            raise ValueError("unclear body length: Transfer-Encoding with Content-Length, or not just chunked")
        return None
    if length is None:
        return -1
    if not re.fullmatch(r"[0-9]{1,15}", length):
        raise ValueError("malformed Content-Length")
    return int(length)


class Dechunker:
    """Decoder of the chunked transfer coding (RFC 9112 §7.1): feed bytes, get the body's bytes; `done` after the last
    chunk, `rest` then holds what follows it. Raises ValueError when the coding is broken."""

    _SIZE = re.compile(rb"([0-9A-Fa-f]{1,12})[ \t]*(?:;[^\r\n\0]*)?")
    _LONGEST_LINE = 4096

    def __init__(self) -> None:
        self.done = False
        self.rest = b""
        self._pending = b""
        self._left = 0
        self._expect = "size"
        self._trailers = 0

    def feed(self, data: bytes) -> bytes:
        """The body bytes that `data` completes."""
        data, position, out = self._pending + data, 0, []
        while not self.done:
            if self._left:
                piece = data[position:position + self._left]
                out.append(piece)
                position += len(piece)
                self._left -= len(piece)
                if self._left:
                    break
            end = data.find(b"\r\n", position)
            if end < 0 and len(data) - position <= self._LONGEST_LINE:
                break
            if end < 0 or end - position > self._LONGEST_LINE:
                raise ValueError("chunk line too long")
            self._line(data[position:end])
            position = end + 2
        self._pending = data[position:]
        if self.done:
            self.rest = self._pending
        return out[0] if len(out) == 1 else b"".join(out)

    def _line(self, line: bytes) -> None:
        if self._expect == "size":
            match = self._SIZE.fullmatch(line)
            if not match:
                raise ValueError("malformed chunk size")
            self._left = int(match.group(1), 16)
            self._expect = "end of chunk" if self._left else "trailer"
        elif self._expect == "end of chunk":
            if line:
                raise ValueError("chunk longer than its size")
            self._expect = "size"
        elif line:
            self._trailers += 1
            if self._trailers > MAX_HEADERS or not _HEADER_LINE.fullmatch(line):
                raise ValueError("malformed or too many trailers")
        else:
            self.done = True


class EventSplitter:
    """Cuts a stream of server-sent events behind its last complete event: feed bytes, get whole events as bytes.

    Line ends may be LF, CRLF or CR (WHATWG HTML §9.2.6). What is held is kept in pieces, so that one huge event costs
    time in proportion to its size."""

    _BLANK_LINES = (b"\n\n", b"\n\r\n", b"\r\r")

    def __init__(self) -> None:
        self._pieces: List[bytes] = []
        self._held = 0
        self._edge = b""

    def feed(self, data: bytes) -> bytes:
        """The events that `data` completes, b"" if none."""
        window = self._edge + data
        cut = max(window.rfind(mark) + len(mark) if mark in window else 0 for mark in self._BLANK_LINES)
        if not cut:
            self._hold(data, window)
            return b""
        cut -= len(self._edge)
        complete = b"".join((*self._pieces, data[:cut])) if self._pieces else data[:cut]
        self._pieces, self._held = [], 0
        self._hold(data[cut:], data[cut:])
        return complete

    def _hold(self, data: bytes, window: bytes) -> None:
        self._edge = window[-2:]
        if data:
            self._pieces.append(data)
            self._held += len(data)
        if self._held > MAX_EVENT_BYTES:
            raise UpstreamProtocolError(f"the provider sent an event of more than {MAX_EVENT_BYTES} bytes")

    def end(self) -> bytes:
        """What is left at the end of the stream: an event that lacks its blank line, or part of one."""
        rest, self._pieces, self._held, self._edge = b"".join(self._pieces), [], 0, b""
        return rest


def parse_events(block: bytes) -> Iterator[Tuple[str, str]]:
    """Whole server-sent events as (event name, data) pairs; comments and events without data are left out.
    Raises UnicodeDecodeError, a ValueError, at the first that is not UTF-8."""
    name, data = "", []
    if block.startswith(b"\xef\xbb\xbf"):
        block = block[3:]
    for line in block.splitlines():
        if line.startswith(b"data:"):
            data.append(line[6:] if line[5:6] == b" " else line[5:])
        elif line.startswith(b"event:"):
            name = line[6:].strip().decode("utf-8")
        elif not line:
            if data:
                yield name, b"\n".join(data).decode("utf-8")
            name, data = "", []
    if data:
        yield name, b"\n".join(data).decode("utf-8")


def sse(data: Mapping[str, Any], name: str = "") -> bytes:
    """One server-sent event with a JSON payload."""
    text = f"event: {name}\ndata: {dumps(data)}\n\n" if name else f"data: {dumps(data)}\n\n"
    return text.encode("ascii")


def parse_retry_after(headers: Mapping[str, str], now: float) -> Optional[float]:
    """Seconds to wait by `retry-after-ms`, or `retry-after` as seconds or HTTP date (RFC 9110 §10.2.3); None when there
    is none or it is unreadable."""
    for value, scale in ((headers.get("retry-after-ms"), 0.001), (headers.get("retry-after"), 1.0)):
        if value and re.fullmatch(r"\s*\d{1,12}(\.\d*)?\s*", value):
            return float(value) * scale
    try:
        date = email.utils.parsedate_to_datetime(headers.get("retry-after", ""))
        return max(0.0, date.timestamp() - now)
    except (TypeError, ValueError, IndexError, OverflowError):
        return None


# Header value types of the AWS event stream that have a fixed length: (bytes, how to read them).
_FIXED_HEADERS: Dict[int, Tuple[int, Callable[[bytes], Any]]] = {
    0: (0, lambda raw: True), 1: (0, lambda raw: False), 9: (16, bytes.hex),
    **{kind: (size, lambda raw: int.from_bytes(raw, "big", signed=True)) for kind, size in
       ((2, 1), (3, 2), (4, 4), (5, 8), (8, 8))}}
_COUNTED_HEADERS: Dict[int, Callable[[bytes], Any]] = {6: bytes, 7: lambda raw: raw.decode("utf-8")}


class EventStreamDecoder:
    """Decoder of `application/vnd.amazon.eventstream`: feed bytes, get (headers, payload) messages as they complete.

    A frame is two big-endian lengths (frame, headers), their CRC-32, headers, payload, and the CRC-32 of all before it.
    Raises `UpstreamProtocolError` for a checksum, length or header that is wrong; what was complete before it comes out
    first. `pending` is the number of bytes of a frame that has begun: above 0 at the end, the stream was cut."""

    _LONGEST_HEADERS = 128 * KIB
    _LONGEST_PAYLOAD = 24 * MIB         # both are the limits of AWS's own SDKs
    _AROUND = 16                        # prelude and last checksum

    def __init__(self) -> None:
        self._buffer = bytearray()      # grows and shrinks in place: a large frame costs time in proportion to its size
        self._length = 0

    @property
    def pending(self) -> int:
        """Bytes of an incomplete frame."""
        return len(self._buffer)

    def feed(self, data: bytes) -> Iterator[Tuple[Dict[str, Any], bytes]]:
        """The messages that `data` completes."""
        self._buffer += data
        while len(self._buffer) >= 12:
            self._length = self._length or self._frame_length()
            if len(self._buffer) < self._length:
                return
            frame = bytes(self._buffer[:self._length])
            del self._buffer[:self._length]
            self._length = 0
            yield self._message(frame)

    def _frame_length(self) -> int:
        prelude = bytes(self._buffer[:12])
        self._check(prelude, "prelude")
        total, headers = int.from_bytes(prelude[:4], "big"), int.from_bytes(prelude[4:8], "big")
        if headers > self._LONGEST_HEADERS or not 0 <= total - headers - self._AROUND <= self._LONGEST_PAYLOAD:
            raise UpstreamProtocolError(f"the provider sent a frame of impossible length ({total}, headers {headers})")
        return total

    def _message(self, frame: bytes) -> Tuple[Dict[str, Any], bytes]:
        self._check(frame, "message")
        end = 12 + int.from_bytes(frame[4:8], "big")
        return parse_event_headers(frame[12:end]), frame[end:-4]

    def _check(self, data: bytes, what: str) -> None:
        if binascii.crc32(data[:-4]) != int.from_bytes(data[-4:], "big"):
            raise UpstreamProtocolError(f"the provider sent a damaged frame: wrong {what} checksum")


def parse_event_headers(data: bytes) -> Dict[str, Any]:
    """The headers of an event-stream frame by name. Raises `UpstreamProtocolError` when they do not fill their space,
    have an unknown type, or name one twice."""
    headers: Dict[str, Any] = {}
    place = 0

    def take(count: int) -> bytes:
        nonlocal place
        place += count
        if place > len(data):
            raise UpstreamProtocolError("the provider sent a frame whose headers are cut")
        return data[place - count:place]

    while place < len(data):
        name, kind = take(take(1)[0]).decode("utf-8", "replace"), take(1)[0]
        if name in headers or (kind not in _FIXED_HEADERS and kind not in _COUNTED_HEADERS):
            raise UpstreamProtocolError(f"the provider sent a frame with a repeated or unreadable header: {name[:80]}")
        if kind in _FIXED_HEADERS:
            size, read = _FIXED_HEADERS[kind]
        else:
            size, read = int.from_bytes(take(2), "big"), _COUNTED_HEADERS[kind]
        try:
            headers[name] = read(take(size))
        except UnicodeDecodeError:
            raise UpstreamProtocolError(f"the provider sent a frame whose header {name[:80]} is not UTF-8") from None
    return headers


# ======================================================================================================================
# §6 Normalisation
# ======================================================================================================================
#
# Fits a conversation to a model, for all pairs of protocols alike, and names what does not fit.

NO_RESULT = "No result provided"

# The fields that a provider protocol may lack: `UpstreamProtocol.carries` says which it has.
OPTIONAL_FIELDS = ("temperature", "top_p", "top_k", "stop", "seed", "frequency_penalty", "presence_penalty",
                   "logit_bias", "parallel_tools", "reasoning", "output", "user", "verbosity")


def normalise(request: Request, model: Model, upstream: UpstreamProtocol, names: Mapping[str, str],
              ) -> Tuple[Request, List[str]]:
    """A request that `model` can take, and the client's names of what had to be left out.

    `names` maps our field names to the client's where they differ. Raises `BadRequest`, code unsupported_parameter,
    for what cannot be left out without changing the answer's shape or meaning."""
    refused = list(request.refused)
    carried = upstream.carries(model)
    missing = [name for name in OPTIONAL_FIELDS if name not in carried and getattr(request, name) not in (None, ())]
    if "output" in missing:
        refused.append((names.get("output", "output"), f"{model.full_id} has no structured output"))
    if request.output and request.output.schema is None and "json_object" not in carried:
        refused.append((names.get("output", "output"),
                        f"{model.full_id} has no free-form JSON mode; give a JSON schema instead"))
    refuse(refused)
    if request.reasoning and request.reasoning.level == "off" and "reasoning" in missing:
        missing.remove("reasoning")         # a model that cannot think does not think
        request = replace(request, reasoning=None)
    lost = [name for name in request.lost if name != "cache_control" or not upstream.marks_cache(model)]
    dropped = [*lost, *(name for name in request.extra if name not in upstream.forwards),
               *(names.get(name, name) for name in missing)]
    request = replace(request, **{name: () if name == "stop" else None for name in missing})
    request = fit_history(request, model, upstream)
    if not request.messages and not request.system:
        where = names.get("messages", "messages")
        raise BadRequest(f"{where}: there is nothing in them", param=where)
    return replace(request, max_tokens=fit_max_tokens(request.max_tokens, model)), dropped


def refuse(refused: Sequence[Tuple[str, str]]) -> None:
    """Raises `BadRequest` for the first of these (path, reason), if there is one."""
    for path, reason in refused:
        raise BadRequest(f"{path}: {reason}", code="unsupported_parameter", param=path)


def fit_max_tokens(asked: Optional[int], model: Model) -> Optional[int]:
    """The output limit, not above the model's own: clients that do not know a model ask for 128,000."""
    return min(asked, model.max_tokens) if asked and model.max_tokens else asked


def fit_history(request: Request, model: Model, upstream: UpstreamProtocol) -> Request:
    """`request` with tool calls and results paired, foreign thinking and empty turns gone, system turns in place only
    where the model allows them."""
    messages = unique_calls(pair_tool_calls(request.messages))
    system = list(request.system)
    if not model.flag("supportsMidConvoSystemMessages"):
        for message in messages:
            if message.role == "system":
                system.extend(part for part in message.parts if isinstance(part, Text))
        messages = [message for message in messages if message.role != "system"]
    fitted = []
    for message in messages:
        parts = tuple(part for part in message.parts if _fits(part, model, upstream))
        if parts:
            fitted.append(replace(message, parts=parts))
    return replace(request, system=tuple(text for text in system if text.text), messages=tuple(fitted))


def _fits(part: Part, model: Model, upstream: UpstreamProtocol) -> bool:
    if isinstance(part, Text):
        return bool(part.text)
    return upstream.replays(part, model) if isinstance(part, Thinking) else True


def pair_tool_calls(messages: Iterable[Message]) -> List[Message]:
    """Messages in which every tool call has exactly one result, right behind its turn and in the order of the calls.

    A missing result is made up as an error that says so; a repeated one replaces the earlier; one that answers no call
    becomes user text; what stood between calls and results goes behind them."""
    paired: List[Message] = []
    waiting: Dict[str, Optional[ToolResult]] = {}
    held: List[Message] = []

    def settle() -> None:
        if waiting:
            results = (result or ToolResult(call_id, (Text(NO_RESULT),), True) for call_id, result in waiting.items())
            paired.append(Message("tool", tuple(results)))
        paired.extend(held)
        waiting.clear()
        held.clear()

    for message in messages:
        if message.role == "tool":
            orphans = []
            for result in message.parts:
                if isinstance(result, ToolResult) and result.call_id in waiting:
                    waiting[result.call_id] = result
                else:
                    orphans.append(result)
            held.extend(_orphan_text(result) for result in orphans if isinstance(result, ToolResult))
        elif message.role == "system" and waiting:
            held.append(message)
        else:
            settle()
            paired.append(message)
            waiting.update((part.id, None) for part in message.parts if isinstance(part, ToolCall))
    settle()
    return paired


def unique_calls(messages: Iterable[Message]) -> List[Message]:
    """Paired messages in which no two calls have the same id: weak models and some hosts number them anew in each turn,
    and Claude demands that ids are unique in the whole conversation."""
    seen: set[str] = set()
    numbers: Dict[str, int] = {}                # the last one behind an id that came more than once
    names: Dict[str, str] = {}
    out = []
    for message in messages:
        if message.role == "assistant":
            names = {}
        parts: List[Part] = []
        for part in message.parts:
            if isinstance(part, ToolCall):
                fresh = part.id
                while fresh in seen:
                    numbers[part.id] = numbers.get(part.id, 1) + 1
                    fresh = f"{part.id}_{numbers[part.id]}"
                seen.add(fresh)
                names[part.id] = fresh
                part = part if fresh == part.id else replace(part, id=fresh)
            elif isinstance(part, ToolResult) and names.get(part.call_id, part.call_id) != part.call_id:
                part = replace(part, call_id=names[part.call_id])
            parts.append(part)
        out.append(replace(message, parts=tuple(parts)))
    return out


def _orphan_text(result: ToolResult) -> Message:
    return Message("user", (Text(f"[Result of a tool call that is not in this conversation, {result.call_id}]"),
                            *result.parts))


def is_paired(messages: Sequence[Message]) -> bool:
    """Whether `pair_tool_calls` would change nothing, so that the client's own body can go out."""
    flat = [part for message in messages for part in message.parts if isinstance(part, (ToolCall, ToolResult))]
    again = [part for message in pair_tool_calls(messages) for part in message.parts
             if isinstance(part, (ToolCall, ToolResult))]
    return flat == again


def fit_id(tool_call_id: str, limit: int) -> str:
    """A tool-call id of at most `limit` of the characters that all providers take. Unfit ids get a hash of the original,
    so that two that only differ in what is removed stay apart; equal ids stay equal, for the call and its result."""
    if re.fullmatch(r"[A-Za-z0-9_-]+", tool_call_id) and len(tool_call_id) <= limit:
        return tool_call_id
    digest = hashlib.sha256(tool_call_id.encode("utf-8", "replace")).hexdigest()[:8]
    return re.sub(r"[^A-Za-z0-9_-]", "_", tool_call_id)[:limit - 9] + "_" + digest


def fit_level(level: str, model: Model) -> Optional[str]:
    """The nearest level that the model has, searched upward first; None when it has none (or cannot be turned off)."""
    def has(candidate: str) -> bool:
        if candidate in model.thinking_levels:
            return model.thinking_levels[candidate] is not None
        return candidate not in ("xhigh", "max")        # these two exist only where the catalogue says so

    if level == "off":
        return "off" if has("off") else None
    place = LEVELS.index(level)
    order = LEVELS[place:] + tuple(reversed(LEVELS[1:place]))
    return next((candidate for candidate in order if has(candidate)), None)


def level_of_budget(budget: int) -> str:
    """The level that a thinking budget in tokens amounts to."""
    return next((level for limit, level in BUDGET_LEVELS if budget <= limit), "max")


MEDIA_TOKENS: Dict[type, float] = {Image: 1400.0, Document: 3000.0}


def estimate_tokens(request: Request) -> int:
    """A guess at the prompt's tokens, for a provider that does not count: on the high side, tools and images included.

    Latin text is about 3.5 characters a token; a character beyond it is about one token of its own."""
    total = 8.0
    for tool in request.tools:
        total += _text_tokens(tool.name + (tool.description or "") + dumps(tool.schema)) + 8
    for message in (*request.messages, Message("system", request.system)):
        for part in _flat_parts(message.parts):
            text = "".join(getattr(part, name, "") or "" for name in ("text", "name", "arguments"))
            total += MEDIA_TOKENS.get(type(part), 0.0) + _text_tokens(text) + 3
    return math.ceil(total)


def _flat_parts(parts: Iterable[Part]) -> Iterator[Part]:
    for part in parts:
        yield from _flat_parts(part.parts) if isinstance(part, ToolResult) else (part,)


def _text_tokens(text: str) -> float:
    wide = 0 if text.isascii() else sum(character > "\u02ff" for character in text)
    return (len(text) - wide) / 3.5 + wide


# What a request's tokens are made of: (tokens for each before anything is known, how far off that may be). A prompt's
# frame and its tools are counted by themselves, since what becomes of them is the provider's affair: some leave tools
# out, and some add a system prompt where there is none.
METER_PRIOR: Dict[str, Tuple[float, float]] = {
    "request": (8, 20), "system": (0, 20), "message": (4, 4), "call": (8, 8), "result": (4, 4), "tool": (8, 8),
    "media": (1, 0.5), "call text": (1, 1), "tool text": (1, 1), "thinking": (1, 1),
    # Latin letters: pieces of words as camelCase cuts them, by length; words that no blank stands before
    "short": (0.9, 0.2), "piece": (0.9, 0.3), "letter": (0.15, 0.1), "letter from the 8th": (0.05, 0.2),
    "capital": (0.15, 0.2), "inner piece": (0.05, 0.2), "glued": (0.15, 0.2), "accented word": (0.3, 0.5),
    "digit": (0.6, 0.5), "number": (0.3, 0.5), "digit and letter": (0.1, 0.3), "blank and digit": (0.3, 0.5),
    "punctuation": (0.6, 0.4), "mark": (0.3, 0.3), "mark from the 4th": (0.05, 0.2), "quote": (0.05, 0.2),
    "underscore": (0.05, 0.2), "blank and mark": (0.05, 0.2),
    "line": (0.2, 0.4), "line ends": (0.2, 0.4), "gap": (0.5, 0.4), "blank in a gap": (0.05, 0.1), "tab": (0, 0.4),
    # all other scripts together, and by how much each differs
    "wide": (1, 1), "wide run": (0.3, 0.5), "latin": (0.8, 0.5), "greek": (0, 1), "cyrillic": (0, 1), "hebrew": (0, 1),
    "arabic": (0, 1), "devanagari": (0, 1), "indic": (0, 1), "southeast asian": (0, 1), "georgian": (0, 1),
    "symbol": (0, 1), "kana": (0, 1), "han": (0, 1), "hangul": (0, 1), "other": (0, 1), "astral": (0, 1)}
_METER_PLACES = {name: place for place, name in enumerate(METER_PRIOR)}
# Where each script begins; what is not listed belongs to the one before it.
_SCRIPTS = (
    (0x80, "latin"), (0x250, "other"), (0x370, "greek"), (0x400, "cyrillic"), (0x530, "other"), (0x590, "hebrew"),
    (0x600, "arabic"), (0x900, "devanagari"), (0x980, "indic"), (0xE00, "southeast asian"), (0x10A0, "georgian"),
    (0x1100, "hangul"), (0x1200, "other"), (0x1E00, "latin"), (0x1F00, "greek"), (0x2000, "symbol"), (0x2E80, "han"),
    (0x3000, "kana"), (0x3400, "han"), (0xA000, "other"), (0xAC00, "hangul"), (0xD800, "other"), (0xF900, "han"),
    (0xFB00, "other"), (0xFF00, "kana"), (0x10000, "astral"))
_SCRIPT_STARTS = [start for start, _ in _SCRIPTS]
_LETTERS, _PIECES = re.compile("[A-Za-z]+"), re.compile("[A-Z]?[a-z]+|[A-Z]+")
_MARKS, _GAPS, _WIDE = re.compile(r"[!-/:-@\[-`{-~]+"), re.compile("[ \t]{2,}"), re.compile("[\u0370-\U0010ffff]+")
_METER_PATTERNS = {"blank and letter": re.compile(" [A-Za-z]"), "digit and letter": re.compile("[0-9][A-Za-z]"),
                   "blank and digit": re.compile(" [0-9]"), "blank and mark": re.compile(r" [!-/:-@\[-`{-~]"),
                   "line ends": re.compile("\n+"), "number": re.compile("[0-9]+")}
_METER_SETS = {"digit": "0123456789", "capital": "ABCDEFGHIJKLMNOPQRSTUVWXYZ", "quote": '"', "underscore": "_",
               "line": "\n", "tab": "\t"}
_ACCENTED = re.compile(r"[^\W\d_]*[\u00c0-\u024f\u1e00-\u1eff][^\W\d_]*")


def _text_features(text: str) -> Dict[str, float]:
    """What a text is made of, by the names of `METER_PRIOR`."""
    found = {name: len(pattern.findall(text)) for name, pattern in _METER_PATTERNS.items()}
    spaced = found.pop("blank and letter")
    words, pieces = len(_LETTERS.findall(text)), list(map(len, _PIECES.findall(text)))
    marks, gaps = list(map(len, _MARKS.findall(text))), list(map(len, _GAPS.findall(text)))
    long_pieces = [length for length in pieces if length > 2]
    counts = collections.Counter(text)
    features: Dict[str, float] = {
        **found, **{name: sum(counts[each] for each in characters) for name, characters in _METER_SETS.items()},
        "short": len(pieces) - len(long_pieces), "piece": len(long_pieces), "letter": sum(long_pieces),
        "letter from the 8th": sum(length - 7 for length in long_pieces if length > 7),
        "inner piece": len(pieces) - words, "glued": words - spaced, "punctuation": len(marks), "mark": sum(marks),
        "mark from the 4th": sum(length - 3 for length in marks if length > 3),
        "gap": len(gaps), "blank in a gap": sum(gaps)}
    if not text.isascii():
        features.update(_script_features(text, counts))
    return features


def _script_features(text: str, counts: Mapping[str, int]) -> Dict[str, float]:
    """How many characters of each script a text has."""
    features: Dict[str, float] = {"accented word": len(_ACCENTED.findall(text)), "wide run": len(_WIDE.findall(text))}
    for character, count in counts.items():
        if character >= "\x80":
            script = _SCRIPTS[bisect.bisect(_SCRIPT_STARTS, ord(character)) - 1][1]
            features[script] = features.get(script, 0) + count
            if script != "latin":
                features["wide"] = features.get("wide", 0) + count
    return features


def _add_features(total: List[float], features: Mapping[str, float]) -> None:
    for name, count in features.items():
        total[_METER_PLACES[name]] += count


def _prior_tokens(text: str) -> float:
    return sum(METER_PRIOR[name][0] * count for name, count in _text_features(text).items())


def _head_features(request: Request) -> List[float]:
    """What the part of a prompt before its messages is made of."""
    total = [0.0] * len(METER_PRIOR)
    tools = "".join(tool.name + (tool.description or "") + dumps(tool.schema) for tool in request.tools)
    _add_features(total, {"request": 1, "system": bool(request.system), "tool": len(request.tools),
                          "tool text": _prior_tokens(tools)})
    _add_features(total, _text_features("\n".join(text.text for text in request.system)))
    return total


def _message_features(messages: Sequence[Message]) -> List[float]:
    """What messages are made of. Pictures and documents count as they always do."""
    total = [0.0] * len(METER_PRIOR)
    parts = [part for message in messages for part in message.parts]
    flat = list(_flat_parts(parts))
    calls = [part for part in flat if isinstance(part, ToolCall)]
    _add_features(total, {
        "message": len(messages), "call": len(calls), "result": sum(isinstance(part, ToolResult) for part in parts),
        "call text": _prior_tokens("\n".join(call.name + call.arguments for call in calls)),
        "thinking": _prior_tokens("\n".join(part.text for part in flat if isinstance(part, Thinking))),
        "media": sum(MEDIA_TOKENS.get(type(part), 0.0) for part in flat)})
    _add_features(total, _text_features("\n".join(part.text for part in flat if isinstance(part, Text))))
    return total


class _ModelMeter:
    """What is known of one model's way of counting: weights by recursive least squares, the prior's for what has not
    been seen, and how far off it was of late, in standard deviations."""

    RECENT = 64
    SURE = 0.93                             # so many of the recent errors would have been covered by the margin

    def __init__(self) -> None:
        self.seen = 0
        self.prefixes: Dict[bytes, int] = {}
        self._weights = [mean for mean, _ in METER_PRIOR.values()]
        self._spread = [[spread ** 2 if row == column else 0.0 for column in range(len(METER_PRIOR))]
                        for row, (_, spread) in enumerate(METER_PRIOR.values())]
        self._surprises: List[float] = []

    def learn(self, features: Sequence[float], tokens: int) -> None:
        """Takes one observation."""
        self.seen += 1
        used = [place for place, count in enumerate(features) if count]
        gain = [sum(row[place] * features[place] for place in used) for row in self._spread]
        variance = self._noise(features, tokens) + sum(features[place] * gain[place] for place in used)
        error = tokens - self._mean(features)
        self._surprises = [*self._surprises[1 - self.RECENT:], error / math.sqrt(variance)]
        self._weights = [weight + each * error / variance for weight, each in zip(self._weights, gain)]
        for row, each in zip(self._spread, gain):
            if each:
                factor = each / variance
                row[:] = [value - factor * other for value, other in zip(row, gain)]

    def _noise(self, features: Sequence[float], tokens: float) -> float:
        """The variance that stays when all weights are known: by style, by words, and by language."""
        foreign = features[_METER_PLACES["wide"]] + features[_METER_PLACES["latin"]]
        return (0.03 * tokens) ** 2 + 0.1 * tokens + (0.1 * foreign) ** 2

    def _mean(self, features: Sequence[float]) -> float:
        return sum(weight * count for weight, count in zip(self._weights, features))

    def estimate(self, features: Sequence[float]) -> float:
        """Tokens on the high side: the mean, and as many of the deviations to expect as it was too low by of late."""
        used = [place for place, count in enumerate(features) if count]
        variance = sum(self._spread[row][column] * features[row] * features[column] for row in used for column in used)
        mean = max(self._mean(features), 1.0)
        errors = sorted([2.0, 2.0, *self._surprises])      # the doubts of a beginning
        margin = max(errors[int(self.SURE * len(errors))], 1.0)
        return mean + margin * math.sqrt(self._noise(features, mean) + max(variance, 0.0))


class TokenMeter:
    """Counts prompts for providers that do not, better with every answer whose usage is observed: by what requests are
    made of, and, for a conversation that has grown, from the count of what came before. Keeps no text: of a beginning a
    keyed digest and its tokens. Safe to share between threads."""

    MODELS, PREFIXES = 64, 512
    ALWAYS, EVERY = 200, 16         # so many of a model's first answers are learnt from, then one in that many

    def __init__(self, key: bytes) -> None:
        self._key = key
        self._lock = threading.Lock()
        self._models: Dict[str, _ModelMeter] = {}
        self._count = 0

    def observe(self, model_id: str, request: Request, tokens: int) -> None:
        """Notes how many tokens the provider counted in a request's prompt."""
        if tokens <= 0:
            return
        digests = self._digests(request)
        with self._lock:
            self._count += 1
            meter = self._models.pop(model_id, None) or _ModelMeter()
            self._models[model_id] = meter                  # as the newest; the oldest makes room
            if len(self._models) > self.MODELS:
                del self._models[next(iter(self._models))]
            known, place = self._known(meter, digests)
            meter.prefixes.pop(digests[-1], None)
            meter.prefixes[digests[-1]] = tokens
            if len(meter.prefixes) > self.PREFIXES:
                del meter.prefixes[next(iter(meter.prefixes))]
            is_learnt = meter.seen < self.ALWAYS or self._count % self.EVERY == 0
        if is_learnt and known < tokens and place < len(digests):
            features = self._features(request, place)
            with self._lock:
                meter.learn(features, tokens - known)

    def estimate(self, model_id: str, request: Request) -> int:
        """The prompt's tokens, on the high side; exact where the very same prompt was observed."""
        digests = self._digests(request) if model_id in self._models else []
        with self._lock:
            meter = self._models.get(model_id)
            known, place = self._known(meter, digests) if meter else (0, 0)
        if meter is None or not digests:
            return estimate_tokens(request)
        if place == len(digests):
            return known
        features = self._features(request, place)
        with self._lock:
            return known + math.ceil(meter.estimate(features))

    def _digests(self, request: Request) -> List[bytes]:
        """A digest of the prompt up to each of its messages, that before the first one left out."""
        hasher = hashlib.blake2b(repr((request.system, request.tools, request.output)).encode("utf-8", "replace"),
                                 digest_size=16, key=self._key)
        digests = []
        for message in request.messages or (Message("", ()),):
            hasher.update(repr((message.role, [_counted(part) for part in message.parts])).encode("utf-8", "replace"))
            digests.append(hasher.digest())
        return digests

    def _known(self, meter: _ModelMeter, digests: Sequence[bytes]) -> Tuple[int, int]:
        """(tokens of the longest beginning that is known, its number of messages)."""
        for place in range(len(digests), 0, -1):
            tokens = meter.prefixes.get(digests[place - 1])
            if tokens is not None:
                return tokens, place
        return 0, 0

    def _features(self, request: Request, place: int) -> List[float]:
        rest = _message_features(request.messages[place:])
        return rest if place else [one + other for one, other in zip(rest, _head_features(request))]


def _counted(part: Part) -> Any:
    """What of a part can be in a prompt: its seals and ids may be others when it comes back."""
    if isinstance(part, ToolCall):
        return part.name, part.arguments
    if isinstance(part, ToolResult):
        return [_counted(inner) for inner in part.parts], part.is_error
    return part.text if isinstance(part, (Text, Thinking)) else part


# ======================================================================================================================
# §7 Client protocols
# ======================================================================================================================
#
# What our clients speak. A client protocol never learns which provider answers.


class Stamp(NamedTuple):
    """What a new answer is marked with: 24 random letters or digits for its id, and the time in epoch seconds."""

    id: str
    created: int

    @property
    def request_id(self) -> str:
        """The id by which logs and error reports name the request."""
        return "req_" + self.id


class ClientProtocol:
    """A dialect that clients speak: bodies in, bodies and event streams out."""

    name = ""
    field_names: Mapping[str, str] = {}     # our field names → the client's, where they differ
    error_types: Mapping[Type[GatewayError], Tuple[Optional[int], str]] = {}   # class → (status if not its own, type)
    heartbeat = b": heartbeat\n\n"
    wants_objects = False                   # tool arguments travel as JSON objects, so they must be some

    def parse(self, data: Dict[str, Any]) -> Request:
        """A request body as a `Request`. Raises `BadRequest` naming the field at fault."""
        raise NotImplementedError

    def render(self, request: Request, reply: Reply, stamp: Stamp) -> Dict[str, Any]:
        """A whole answer."""
        raise NotImplementedError

    def writer(self, request: Request, stamp: Stamp) -> Writer:
        """A fresh `Writer` for one streamed answer."""
        raise NotImplementedError

    def render_error(self, error: GatewayError, request_id: str) -> Tuple[int, Dict[str, Any]]:
        """An error as (HTTP status, body) in the client's envelope."""
        raise NotImplementedError

    def error_event(self, error: GatewayError, request_id: str) -> bytes:
        """An error as the last event of a stream."""
        return sse(self.render_error(error, request_id)[1])

    def classify(self, error: GatewayError) -> Tuple[int, str]:
        """Status and the client's own word for an error, by the nearest class in `error_types`."""
        for kind in type(error).__mro__:
            if kind in self.error_types:
                status, word = self.error_types[kind]
                return status or error.status, word
        return error.status, "api_error"


class Writer:
    """Events in, bytes for the client out; one per streamed answer."""

    def write(self, events: Iterable[Event]) -> bytes:
        """The bytes that these events become, all of them together."""
        return b"".join([self.handlers[type(event)](self, event) for event in events])

    handlers: Mapping[type, Callable[[Any, Any], bytes]] = {}


class SerialWriter(Writer):
    """A writer for clients that see one part at a time: the events of a part that overlaps the open one wait until that
    ends. A text begins with its first piece, so that empty ones are never sent."""

    def __init__(self, request: Request, stamp: Stamp) -> None:
        self._request = request
        self._stamp = stamp
        self._open: Optional[int] = None        # the representation's index of the open part
        self._unsent: Optional[Part] = None     # an open text of which nothing was sent
        self._waiting: Dict[int, List[Event]] = {}
        self._hidden: set[int] = set()

    def hides(self, part: Part) -> bool:
        """Whether the client is not to see this part."""
        return False

    def begin(self, part: Part) -> bytes:
        """The beginning of a part."""
        raise NotImplementedError

    def piece(self, text: str) -> bytes:
        """More of the open part."""
        raise NotImplementedError

    def finish(self, part: Part) -> bytes:
        """The end of the open part, which is the whole of it."""
        raise NotImplementedError

    def part_start(self, event: PartStart) -> bytes:
        """Handles the event."""
        if self.hides(event.part):
            self._hidden.add(event.index)
            return b""
        if self._open is not None:
            self._waiting[event.index] = [event]
            return b""
        self._open = event.index
        if isinstance(event.part, Text):
            self._unsent = event.part
            return b""
        return self.begin(event.part)

    def part_delta(self, event: PartDelta) -> bytes:
        """Handles the event."""
        if event.index != self._open:
            if event.index not in self._hidden:
                self._waiting[event.index].append(event)
            return b""
        if self._unsent is None:
            return self.piece(event.text)
        opening, self._unsent = self.begin(self._unsent), None
        return opening + self.piece(event.text)

    def part_end(self, event: PartEnd) -> bytes:
        """Handles the event, and those that have waited for it."""
        if event.index in self._hidden:
            return b""
        if event.index != self._open:
            self._waiting[event.index].append(event)
            return b""
        out = self.finish(event.part) if self._unsent is None else b""
        self._open, self._unsent = None, None
        if self._waiting:
            out += self.write(self._waiting.pop(min(self._waiting)))
        return out


class Notes:
    """What a parser finds beside the conversation; see `Request`."""

    def __init__(self) -> None:
        self.lost: List[str] = []
        self.refused: List[Tuple[str, str]] = []
        self.images: List[str] = []
        self.seals: List[str] = []
        self.function_ids: Dict[str, str] = {}

    def lose(self, path: str) -> None:
        """Names something that a translation leaves out."""
        if path not in self.lost:
            self.lost.append(path)


def missing_field(path: str) -> BadRequest:
    """The error for a field that must be there."""
    return BadRequest(f"{path}: Field required", code="missing_required_parameter", param=path)


_KINDS: Dict[str, Callable[[Any], bool]] = {
    "a string": lambda value: isinstance(value, str),
    "an integer": lambda value: isinstance(value, int) and not isinstance(value, bool),
    "a number": lambda value: isinstance(value, (int, float)) and not isinstance(value, bool),
    "a boolean": lambda value: isinstance(value, bool),
    "an array": lambda value: isinstance(value, list),
    "an object": lambda value: isinstance(value, dict),
}
_JSON_TYPES: Dict[type, str] = {str: "string", int: "integer", float: "number", bool: "boolean", list: "array", dict: "object",
               type(None): "null"}


def check(value: Any, kind: str, path: str, low: Optional[float] = None, high: Optional[float] = None) -> Any:
    """`value` if it is of that kind and in range; else a `BadRequest` that names the path."""
    if not _KINDS[kind](value):
        raise BadRequest(f"{path}: must be {kind}, not {_JSON_TYPES.get(type(value), 'unknown')}",
                         code="invalid_type", param=path)
    if (low is not None and value < low) or (high is not None and value > high):
        limits = f"at least {low:g}" if high is None else f"between {low:g} and {high:g}"
        raise BadRequest(f"{path}: must be {limits}, not {value}", param=path)
    return value


def optional(data: Mapping[str, Any], name: str, kind: str, path: str = "", low: Optional[float] = None,
             high: Optional[float] = None) -> Any:
    """The checked field, None when it is absent or null."""
    value = data.get(name)
    return None if value is None else check(value, kind, join_path(path, name), low, high)


def required(data: Mapping[str, Any], name: str, kind: str, path: str = "", low: Optional[float] = None) -> Any:
    """The checked field; a `BadRequest` when it is absent or null."""
    if data.get(name) is None:
        raise missing_field(join_path(path, name))
    return check(data[name], kind, join_path(path, name), low)


def join_path(path: str, name: str) -> str:
    """`messages[0]` and `role` make `messages[0].role`."""
    return f"{path}.{name}" if path else name


def objects(items: Any, path: str) -> Iterator[Tuple[str, Dict[str, Any]]]:
    """(path, item) for each item of an array of objects; nothing for null."""
    items = [] if items is None else check(items, "an array", path)
    if len(items) > MAX_ITEMS:
        raise BadRequest(f"{path}: at most {MAX_ITEMS} items", param=path)
    for index, item in enumerate(items):
        where = f"{path}[{index}]"
        yield where, check(item, "an object", where)


json_text: Callable[[Any], str] = json.JSONEncoder(ensure_ascii=False, separators=(",", ":"), allow_nan=False).encode


def parse_data_url(url: str, path: str) -> Tuple[str, str]:
    """(media type, base64 data) of a data URL, RFC 2397."""
    header, comma, payload = url[len("data:"):].partition(",")
    if not comma:
        raise BadRequest(f"{path}: a data URL needs a comma before its data", param=path)
    media_type, *params = header.split(";")
    if "base64" not in params:
        payload = base64.b64encode(urllib.parse.unquote_to_bytes(payload)).decode("ascii")
    return media_type or "text/plain", check_base64(payload, path)


# Where a client may name a level of thinking outside its own API's field, as piai-router reads it, in that order.
EFFORT_PATHS = (("effort",), ("metadata", "effort"), ("metadata", "reasoning_effort"), ("thinking", "effort"),
                ("reasoning", "effort"))


def stray_effort(data: Mapping[str, Any]) -> Optional[str]:
    """The first level that a body names at one of `EFFORT_PATHS`."""
    for *outer, name in EFFORT_PATHS:
        word = (as_dict(data.get(outer[0])) if outer else data).get(name)
        if isinstance(word, str) and word.lower() in LEVEL_ALIASES:
            return LEVEL_ALIASES[word.lower()]
    return None


def check_base64(data: str, path: str) -> str:
    """`data` without white space, if it is base64 of something."""
    data = "".join(data.split())
    try:
        if base64.b64decode(data, validate=True):
            return data
    except (binascii.Error, ValueError):
        pass
    raise BadRequest(f"{path}: invalid or empty base64 data", param=path)


def check_url(url: str, path: str) -> str:
    """`url` if it is http or https with a host."""
    try:
        split = urllib.parse.urlsplit(url)
        if split.scheme in ("http", "https") and split.hostname:
            return url
    except ValueError:
        pass
    raise BadRequest(f"{path}: must be an http, https or data URL", param=path)


# A signature goes to the client bare when the client's protocol made it, else inside a seal that names its maker, so
# that what comes back is given to that maker and to nobody else. Nothing is invented: the seal opens to the same bytes.
_SEAL = "pigw1."


def seal(part: Thinking, protocol: str) -> str:
    """The signature of `part` as a client of `protocol` is to keep it, "" when there is none."""
    if not part.signature or part.maker == protocol:
        return part.signature or ""
    packed = json_text([part.maker, part.signature, part.origin]).encode("utf-8", "surrogatepass")
    return _SEAL + base64.urlsafe_b64encode(packed).decode("ascii")


def unseal(signature: Optional[str], protocol: str) -> Tuple[Optional[str], str, str]:
    """(signature, maker, origin) of what a client of `protocol` gave back."""
    if not signature or not signature.startswith(_SEAL):
        return signature or None, protocol, ""
    try:
        maker, inner, origin = (json.loads(base64.urlsafe_b64decode(signature[len(_SEAL):])) + [""])[:3]
    except (ValueError, TypeError):
        return None, "", ""
    return (inner, maker, origin) if all(isinstance(text, str) for text in (maker, inner, origin)) else (None, "", "")


# --- OpenAI, both APIs ------------------------------------------------------------------------------------------------

TOOL_CHOICES = ("auto", "none", "required")


class OpenAIClient(ClientProtocol):
    """What OpenAI's two APIs have in common: how they say that something went wrong."""

    error_types = {
        GatewayError: (None, "server_error"), BadRequest: (None, "invalid_request_error"),
        Unauthorized: (None, "authentication_error"), Forbidden: (None, "permission_error"),
        ShuttingDown: (None, "service_unavailable_error"),
        UpstreamError: (None, "upstream_error"), CredentialRefused: (None, "authentication_error"),
        RateLimited: (None, "rate_limit_error"), QuotaExceeded: (None, "insufficient_quota"),
        Overloaded: (None, "service_unavailable_error"), UpstreamTimeout: (None, "server_error"),
    }
    content_parts: Mapping[str, Callable[..., Optional[Part]]] = {}

    def content(self, content: Any, path: str, notes: Notes) -> Tuple[Part, ...]:
        """A string or an array of parts, each read by `content_parts`."""
        if isinstance(content, str):
            return (Text(content),) if content else ()
        if not isinstance(content, list):
            raise BadRequest(f"{path}: must be a string or an array of parts", code="invalid_type", param=path)
        parts = []
        for where, part in objects(content, path):
            kind = required(part, "type", "a string", where)
            if part.get("cache_control") is not None:
                notes.lose(f"{where}.cache_control")
            if kind in self.content_parts:
                parts.append(self.content_parts[kind](self, part, where, notes))
            else:
                notes.refused.append((f"{where}.type", f"content of type {kind[:40]!r} cannot go to this model"))
        return tuple(part for part in parts if part is not None)

    def text_part(self, part: Dict[str, Any], path: str, notes: Notes) -> Text:
        """Reads text."""
        return Text(required(part, "text", "a string", path))

    def refusal_part(self, part: Dict[str, Any], path: str, notes: Notes) -> Text:
        """Reads an earlier refusal, which to other models is text."""
        return Text(required(part, "refusal", "a string", path))

    def render_error(self, error: GatewayError, request_id: str) -> Tuple[int, Dict[str, Any]]:
        """The envelope {"error": {message, type, param, code}}."""
        status, word = self.classify(error)
        return status, {"error": {"message": error.message, "type": word, "param": error.param, "code": error.code}}


def checked_fields(data: Mapping[str, Any], table: Mapping[str, Tuple[str, Optional[float], Optional[float]]],
                   ) -> Dict[str, Any]:
    """The scalar fields of a request, checked by a table of kinds and ranges."""
    return {name: optional(data, name, kind, "", low, high) for name, (kind, low, high) in table.items()}


def without_defaults(fields: Mapping[str, Any], defaults: Mapping[str, Any]) -> Dict[str, Any]:
    """The fields with None for values that ask for nothing."""
    return {name: None if name in defaults and value == defaults[name] else value for name, value in fields.items()}


def extra_fields(data: Mapping[str, Any], known: FrozenSet[str], defaults: Mapping[str, Any],
                 refusals: Mapping[str, str], notes: Notes) -> Dict[str, Any]:
    """What a request says beyond the known fields; what would change the answer is noted as refused instead."""
    extra = {}
    for name, value in data.items():
        if name in known or value is None or (name in defaults and value == defaults[name]):
            continue
        if name in refusals:
            notes.refused.append((name, refusals[name]))
        else:
            extra[name] = value
    return extra


def leading_texts(turns: Iterable[Message]) -> Tuple[Text, ...]:
    """The texts of the system turns with which a conversation begins."""
    return tuple(part for turn in turns for part in turn.parts if isinstance(part, Text))


def function_tool(item: Dict[str, Any], path: str) -> Tool:
    """A function as OpenAI declares it."""
    return Tool(required(item, "name", "a string", path), optional(item, "description", "a string", path),
                optional(item, "parameters", "an object", path) or {"type": "object", "properties": {}},
                optional(item, "strict", "a boolean", path))


def custom_tool(item: Dict[str, Any], grammar: Any, path: str) -> Tool:
    """A tool that takes free text; its grammar, which other providers cannot enforce, is described to the model."""
    description = optional(item, "description", "a string", path) or ""
    if isinstance(grammar, dict) and grammar.get("definition"):
        description += f"\n\nThe input must follow this {grammar.get('syntax')} grammar:\n{grammar['definition']}"
    schema = {"type": "object", "properties": {"input": {"type": "string"}}, "required": ["input"]}
    return Tool(required(item, "name", "a string", path), description or None, schema, custom=True)


def plain_choice(value: str, path: str) -> ToolChoice:
    """A tool choice that is a word."""
    if value not in TOOL_CHOICES:
        raise BadRequest(f"{path}: must be none, auto, required or an object", param=path)
    return ToolChoice(value)


def named_choice(name: str, tools: Sequence[Tool], path: str) -> ToolChoice:
    """The choice of one tool, by its own name or by that in its namespace."""
    for tool in tools:
        if name in (tool.name, *tool.path[1:]):
            return ToolChoice("tool", tool.name)
    raise BadRequest(f"{path}: no tool is called {name!r}", param=path)


def allowed_choice(mode: Any, names: Sequence[str], tools: Sequence[Tool]) -> Tuple[ToolChoice, List[Tool]]:
    """The choice among some of the tools, and these."""
    allowed = [tool for tool in tools if {tool.name, *tool.path[1:]}.intersection(names)]
    return ToolChoice("required" if mode == "required" else "auto"), allowed


def format_kind(value: Mapping[str, Any], path: str) -> str:
    """The type of a response format: text, json_object or json_schema."""
    kind = value.get("type")
    if kind not in ("text", "json_object", "json_schema"):
        raise BadRequest(f"{path}.type: must be text, json_object or json_schema", param=f"{path}.type")
    return str(kind)


def schema_format(value: Dict[str, Any], path: str) -> OutputFormat:
    """Structured output by a schema: {name, schema, strict}."""
    return OutputFormat(optional(value, "schema", "an object", path) or {"type": "object"},
                        optional(value, "name", "a string", path) or "output",
                        optional(value, "strict", "a boolean", path))


def url_image(url: str, detail: Optional[str], path: str) -> Image:
    """A picture by its address or data URL."""
    if not url.startswith("data:"):
        return Image(url=check_url(url, path), detail=detail)
    media_type, payload = parse_data_url(url, path)
    if not media_type.startswith("image/"):
        raise BadRequest(f"{path}: {media_type} is not an image type", param=path)
    return Image(media_type, payload, detail=detail)


def file_document(payload: str, name: Optional[str], path: str) -> Document:
    """A file by its data URL, or by base64 of a PDF."""
    media_type = "application/pdf"
    if payload.startswith("data:"):
        media_type, payload = parse_data_url(payload, path)
    return Document(media_type, payload, name=name)


def call_arguments(value: Any, path: str) -> str:
    """The arguments of a call, which are JSON text; some clients forget to encode them."""
    if isinstance(value, dict):
        return json_text(value)
    return "" if value is None else check(value, "a string", path)


# --- OpenAI Chat Completions ------------------------------------------------------------------------------------------

CHAT_FINISH = {"stop": "stop", "stop_sequence": "stop", "pause": "stop", "length": "length", "overflow": "length",
               "tool_use": "tool_calls", "refusal": "content_filter"}

# Scalar request fields: (kind, low, high). Ranges by the OpenAI API description, 2.3.0.
CHAT_FIELDS: Dict[str, Tuple[str, Optional[float], Optional[float]]] = {
    "temperature": ("a number", 0, 2), "top_p": ("a number", 0, 1), "top_k": ("an integer", None, None),
    "seed": ("an integer", None, None), "frequency_penalty": ("a number", -2, 2),
    "presence_penalty": ("a number", -2, 2), "n": ("an integer", 1, 128), "logprobs": ("a boolean", None, None),
    "top_logprobs": ("an integer", 0, 20), "max_tokens": ("an integer", 1, None),
    "max_completion_tokens": ("an integer", 1, None), "user": ("a string", None, None),
    "safety_identifier": ("a string", None, None), "stream": ("a boolean", None, None),
    "stream_options": ("an object", None, None), "parallel_tool_calls": ("a boolean", None, None),
    "logit_bias": ("an object", None, None), "metadata": ("an object", None, None), "store": ("a boolean", None, None),
    "reasoning_effort": ("a string", None, None), "verbosity": ("a string", None, None),
    "response_format": ("an object", None, None), "modalities": ("an array", None, None),
    "tools": ("an array", None, None), "functions": ("an array", None, None), "service_tier": ("a string", None, None),
    "prediction": ("an object", None, None), "prompt_cache_key": ("a string", None, None),
}
# Values that ask for nothing, which some clients always send.
CHAT_DEFAULTS: Dict[str, Any] = {
    "n": 1, "logprobs": False, "top_logprobs": 0, "modalities": ["text"], "store": False, "service_tier": "auto",
    "metadata": {}, "logit_bias": {}, "frequency_penalty": 0, "presence_penalty": 0, "top_p": 1, "stop": [],
}
CHAT_REFUSALS = {
    "n": "only one choice can be made on this model", "logprobs": "log probabilities are not available on this model",
    "top_logprobs": "log probabilities are not available on this model",
    "audio": "audio answers are not available on this model",
    "modalities": "only text answers are available on this model",
}
# Read into the representation, or without meaning for a provider.
CHAT_KNOWN = frozenset({
    "model", "messages", "stream", "stream_options", "max_tokens", "max_completion_tokens", "temperature", "top_p",
    "top_k", "stop", "seed", "frequency_penalty", "presence_penalty", "logit_bias", "response_format", "tools",
    "tool_choice", "functions", "function_call", "parallel_tool_calls", "user", "safety_identifier", "verbosity"})


class OpenAIChat(OpenAIClient):
    """OpenAI Chat Completions: POST /v1/chat/completions."""

    name = "openai-chat"
    field_names = {"parallel_tools": "parallel_tool_calls", "output": "response_format",
                   "reasoning": "reasoning_effort"}

    def parse(self, data: Dict[str, Any]) -> Request:
        """See `ClientProtocol.parse`; fields by the OpenAI API description, 2.3.0."""
        notes = Notes()
        fields = checked_fields(data, CHAT_FIELDS)
        said = without_defaults(fields, CHAT_DEFAULTS)
        model = required(data, "model", "a string")
        turns = self._messages(required(data, "messages", "an array"), notes)
        leading = next((place for place, turn in enumerate(turns) if turn.role != "system"), len(turns))
        reasoning, reasoning_fields = self.reasoning(data)
        tools = self._tools(data, notes)
        tool_choice, tools = self._tool_choice(data, tools)
        extra = extra_fields(data, CHAT_KNOWN.union(reasoning_fields), CHAT_DEFAULTS, CHAT_REFUSALS, notes)
        return Request(
            model=model, messages=tuple(turns[leading:]), tools=tuple(tools), tool_choice=tool_choice,
            system=leading_texts(turns[:leading]),
            max_tokens=said["max_completion_tokens"] or said["max_tokens"], stop=self._stop(data.get("stop")),
            output=self._output(fields["response_format"]), reasoning=reasoning,
            user=said["user"] or said["safety_identifier"], parallel_tools=False if fields["parallel_tool_calls"] is False
            else None, stream=bool(fields["stream"]),
            include_usage=bool((fields["stream_options"] or {}).get("include_usage")),
            protocol=self.name, extra=extra, lost=tuple(notes.lost), refused=tuple(notes.refused),
            images=tuple(notes.images), seals=tuple(notes.seals), data=data,
            **{name: said[name] for name in ("temperature", "top_p", "top_k", "seed", "frequency_penalty",
                                             "presence_penalty", "logit_bias", "verbosity")})

    def _stop(self, value: Any) -> Tuple[str, ...]:
        texts = [value] if isinstance(value, str) else check([] if value is None else value, "an array", "stop")
        return tuple(check(text, "a string", f"stop[{index}]") for index, text in enumerate(texts) if text != "")

    def _output(self, value: Optional[Dict[str, Any]]) -> Optional[OutputFormat]:
        kind = "text" if value is None else format_kind(value, "response_format")
        if value is None or kind != "json_schema":
            return OutputFormat() if kind == "json_object" else None
        inner = required(value, "json_schema", "an object", "response_format")
        return schema_format(inner, "response_format.json_schema")

    def reasoning(self, data: Dict[str, Any]) -> Tuple[Optional[Reasoning], List[str]]:
        """How hard to think, in any of the spellings in use, and the names of the fields that said so."""
        effort = data.get("reasoning_effort")
        if isinstance(effort, str) and effort.lower() in LEVEL_ALIASES:
            return Reasoning(LEVEL_ALIASES[effort.lower()]), ["reasoning_effort"]
        stray = stray_effort(data)
        if stray:
            return Reasoning(stray), [name for name in ("effort", "reasoning", "thinking") if name in data]
        options = data.get("reasoning")                                     # OpenRouter
        if isinstance(options, dict):
            budget = options.get("max_tokens")
            if isinstance(budget, int) and not isinstance(budget, bool):
                return Reasoning(level_of_budget(budget), budget if budget > 0 else None), ["reasoning"]
            if isinstance(options.get("enabled"), bool):
                return Reasoning("medium" if options["enabled"] else "off"), ["reasoning"]
        options = data.get("thinking")                                      # DeepSeek, Z.ai; Anthropic's spelling
        if isinstance(options, dict) and options.get("type") in ("enabled", "disabled", "adaptive"):
            budget = options.get("budget_tokens")
            if options["type"] != "disabled" and isinstance(budget, int) and budget > 0:
                return Reasoning(level_of_budget(budget), budget), ["thinking"]
            return Reasoning("off" if options["type"] == "disabled" else "medium"), ["thinking"]
        if isinstance(data.get("enable_thinking"), bool):                   # Qwen
            return Reasoning("medium" if data["enable_thinking"] else "off"), ["enable_thinking"]
        return None, []

    def _tools(self, data: Dict[str, Any], notes: Notes) -> List[Tool]:
        tools = []
        for path, item in objects(data.get("tools"), "tools"):
            kind = item.get("type", "function")
            if kind == "function":
                tools.append(function_tool(required(item, "function", "an object", path), f"{path}.function"))
            elif kind == "custom":
                inner = required(item, "custom", "an object", path)
                form = inner.get("format")
                grammar = form.get("grammar") if isinstance(form, dict) else None
                tools.append(custom_tool(inner, grammar, f"{path}.custom"))
            else:
                notes.lose(path)
        for path, item in objects(data.get("functions"), "functions"):
            tools.append(function_tool(item, path))
        return tools

    def _tool_choice(self, data: Dict[str, Any], tools: List[Tool]) -> Tuple[Optional[ToolChoice], List[Tool]]:
        value, path = data.get("tool_choice"), "tool_choice"
        if value is None and data.get("function_call") is not None:
            value, path = data["function_call"], "function_call"
            if isinstance(value, dict):
                value = {"type": "function", "function": value}
        if value is None:
            return None, tools
        if isinstance(value, str):
            return plain_choice(value, path), tools
        check(value, "an object", path)
        kind = value.get("type")
        if kind in ("function", "custom"):
            name = required(required(value, kind, "an object", path), "name", "a string", f"{path}.{kind}")
            return named_choice(name, tools, f"{path}.{kind}.name"), tools
        if kind != "allowed_tools":
            raise BadRequest(f"{path}.type: must be function, custom or allowed_tools", param=f"{path}.type")
        allowed = required(value, "allowed_tools", "an object", path)
        names = [self._allowed_name(item, where)
                 for where, item in objects(allowed.get("tools"), f"{path}.allowed_tools.tools")]
        return allowed_choice(allowed.get("mode"), names, tools)

    def _allowed_name(self, item: Dict[str, Any], path: str) -> str:
        kind = optional(item, "type", "a string", path) or "function"
        inner = optional(item, kind, "an object", path)
        return required(inner or item, "name", "a string", join_path(path, kind) if inner else path)

    def _messages(self, items: Sequence[Any], notes: Notes) -> List[Message]:
        if not items:
            raise BadRequest("messages: at least one message is required", param="messages")
        turns: List[Message] = []
        results: List[Part] = []                # of neighbouring tool messages, which are one turn
        for path, item in objects(items, "messages"):
            role = required(item, "role", "a string", path)
            if role not in self.roles:
                raise BadRequest(f"{path}.role: must be one of {', '.join(sorted(self.roles))}, not {role[:40]!r}",
                                 param=f"{path}.role")
            if item.get("name") is not None and role != "function":
                notes.lose(f"{path}.name")
            turn = self.roles[role](self, item, path, notes)
            if turn.role == "tool":
                results.extend(turn.parts)
                continue
            if results:
                turns.append(Message("tool", tuple(results)))
                results = []
            turns.append(turn)
        return turns + ([Message("tool", tuple(results))] if results else [])

    def _system(self, item: Dict[str, Any], path: str, notes: Notes) -> Message:
        return Message("system", self._content(item, path, notes))

    def _user(self, item: Dict[str, Any], path: str, notes: Notes) -> Message:
        if item.get("content") is None:
            raise missing_field(f"{path}.content")
        return Message("user", self._content(item, path, notes))

    def _assistant(self, item: Dict[str, Any], path: str, notes: Notes) -> Message:
        parts: List[Part] = self._thinking(item, path, notes)
        parts.extend(self._content(item, path, notes))
        if isinstance(item.get("refusal"), str):
            parts.append(Text(item["refusal"]))
        if item.get("audio") is not None:
            notes.lose(f"{path}.audio")
        for where, call in objects(item.get("tool_calls"), f"{path}.tool_calls"):
            parts.append(self._call(call, where))
        legacy = optional(item, "function_call", "an object", path)
        if legacy:
            call_id = f"call_{len(notes.function_ids)}_{path}"
            parts.append(self._call({"id": call_id, "function": legacy}, path))
            notes.function_ids[parts[-1].name] = call_id
        return Message("assistant", tuple(parts))

    def _thinking(self, item: Dict[str, Any], path: str, notes: Notes) -> List[Part]:
        parts: List[Part] = []
        for where, detail in objects(item.get("reasoning_details"), f"{path}.reasoning_details"):
            notes.seals.extend(detail_seals(detail))
            sealed = detail.get("data") or detail.get("signature")
            signature, maker, origin = unseal(sealed if isinstance(sealed, str) else None, self.name)
            if signature and maker != self.name:
                text = detail.get("text")
                parts.append(Thinking(text if isinstance(text, str) else "", signature, "data" in detail, maker, origin))
        text = item.get("reasoning_content") or item.get("reasoning")
        return parts or ([Thinking(text)] if isinstance(text, str) else [])

    def _call(self, call: Dict[str, Any], path: str) -> ToolCall:
        call_id = required(call, "id", "a string", path)
        if call.get("type") == "custom":
            custom = required(call, "custom", "an object", path)
            text = optional(custom, "input", "a string", f"{path}.custom") or ""
            return ToolCall(call_id, required(custom, "name", "a string", f"{path}.custom"), json_text({"input": text}))
        function = required(call, "function", "an object", path)
        arguments = call_arguments(function.get("arguments"), f"{path}.function.arguments")
        return ToolCall(call_id, required(function, "name", "a string", f"{path}.function"), arguments)

    def _tool(self, item: Dict[str, Any], path: str, notes: Notes) -> Message:
        call_id = required(item, "tool_call_id", "a string", path)
        return Message("tool", (ToolResult(call_id, self._content(item, path, notes)),))

    def _legacy_result(self, item: Dict[str, Any], path: str, notes: Notes) -> Message:
        name = required(item, "name", "a string", path)
        call_id = notes.function_ids.get(name, f"call_{path}")
        return Message("tool", (ToolResult(call_id, self._content(item, path, notes)),))

    def _content(self, item: Dict[str, Any], path: str, notes: Notes) -> Tuple[Part, ...]:
        content = item.get("content")
        return () if content is None else self.content(content, f"{path}.content", notes)

    def _image_part(self, part: Dict[str, Any], path: str, notes: Notes) -> Image:
        value, where = part.get("image_url"), f"{path}.image_url"
        notes.images.append(path)
        if isinstance(value, str):
            value = {"url": value}
        elif value is None:
            raise missing_field(where)
        url = required(check(value, "an object", where), "url", "a string", where)
        detail = optional(value, "detail", "a string", where)
        return url_image(url, detail, f"{where}.url")

    def _file_part(self, part: Dict[str, Any], path: str, notes: Notes) -> Optional[Document]:
        value, where = required(part, "file", "an object", path), f"{path}.file"
        payload = optional(value, "file_data", "a string", where)
        if payload is None:
            notes.refused.append((where, "only file_data can go to this model, not file_id"))
            return None
        return file_document(payload, optional(value, "filename", "a string", where), f"{where}.file_data")

    roles: Mapping[str, Callable[..., Message]] = {
        "system": _system, "developer": _system, "user": _user, "assistant": _assistant, "tool": _tool,
        "function": _legacy_result}
    content_parts: Mapping[str, Callable[..., Optional[Part]]] = {
        "text": OpenAIClient.text_part, "refusal": OpenAIClient.refusal_part, "image_url": _image_part,
        "file": _file_part}

    def render(self, request: Request, reply: Reply, stamp: Stamp) -> Dict[str, Any]:
        """A chat.completion object."""
        text = "".join(part.text for part in reply.parts if isinstance(part, Text))
        thinking = [part for part in reply.parts if isinstance(part, Thinking)]
        custom = custom_tools(request)
        calls = [chat_tool_call(part, custom) for part in reply.parts if isinstance(part, ToolCall)]
        message: Dict[str, Any] = {"role": "assistant", "content": text if text or not calls else None,
                                   "refusal": reply.detail if reply.stop_reason == "refusal" else None,
                                   "annotations": []}
        message.update(present(
            reasoning_content="".join(part.text for part in thinking) or None,
            reasoning_details=[detail for part in thinking for detail in reasoning_details(part)] or None,
            tool_calls=calls or None))
        choice = {"index": 0, "message": message, "logprobs": None, "finish_reason": CHAT_FINISH[reply.stop_reason]}
        return {"id": chat_id(reply.id, stamp), "object": "chat.completion", "created": stamp.created,
                "model": request.model, "system_fingerprint": FINGERPRINT, "choices": [choice],
                "usage": chat_usage(reply.usage)}

    def writer(self, request: Request, stamp: Stamp) -> Writer:
        """See `ClientProtocol.writer`."""
        return ChatWriter(request, stamp)


FINGERPRINT = f"fp_{NAME}"


def chat_id(provider_id: str, stamp: Stamp) -> str:
    """The provider's id if it has the form that clients expect, else a new one."""
    return provider_id if provider_id.startswith("chatcmpl-") else "chatcmpl-" + stamp.id


def chat_usage(usage: Usage) -> Dict[str, Any]:
    """Usage in OpenAI's terms: prompt_tokens includes cached tokens."""
    return {"prompt_tokens": usage.prompt, "completion_tokens": usage.output,
            "total_tokens": usage.prompt + usage.output,
            "prompt_tokens_details": {"cached_tokens": usage.cache_read, "cache_write_tokens": usage.cache_write,
                                      "audio_tokens": 0},
            "completion_tokens_details": {"reasoning_tokens": usage.reasoning, "audio_tokens": 0,
                                          "accepted_prediction_tokens": 0, "rejected_prediction_tokens": 0}}


def custom_tools(request: Request) -> FrozenSet[str]:
    """The names of the tools that take free text."""
    return frozenset(tool.name for tool in request.tools if tool.custom)


def custom_input(call: ToolCall) -> str:
    """The free text of a custom tool's call, which travelled as {"input": text}."""
    arguments = repair_json_object(call.arguments)
    text = (arguments or {}).get("input")
    return text if isinstance(text, str) else call.arguments


def chat_tool_call(call: ToolCall, custom: FrozenSet[str]) -> Dict[str, Any]:
    """A complete tool call in OpenAI's shape."""
    if call.name in custom:
        return {"id": call.id, "type": "custom", "custom": {"name": call.name, "input": custom_input(call)}}
    return {"id": call.id, "type": "function", "function": {"name": call.name, "arguments": call.arguments or "{}"}}


def reasoning_details(part: Thinking) -> List[Dict[str, Any]]:
    """What a chat client needs to give signed thinking back, in OpenRouter's shape; nothing for unsigned thinking."""
    if not part.signature:
        return []
    sealed = seal(part, OpenAIChat.name)
    if part.redacted:
        return [{"type": "reasoning.encrypted", "data": sealed}]
    return [{"type": "reasoning.text", "text": part.text, "signature": sealed}]


class ChatWriter(Writer):
    """Events → chat.completion.chunk frames. All but the delta is the same in every chunk and encoded once."""

    def __init__(self, request: Request, stamp: Stamp) -> None:
        self._request = request
        self._stamp = stamp
        self._custom = custom_tools(request)
        self._kinds: Dict[int, type] = {}
        self._tool_index: Dict[int, int] = {}
        self._unsent: Dict[int, bool] = {}
        self._set_id("")

    def _set_id(self, provider_id: str) -> None:
        envelope = dumps({"id": chat_id(provider_id, self._stamp), "object": "chat.completion.chunk",
                          "created": self._stamp.created, "model": self._request.model,
                          "system_fingerprint": FINGERPRINT})[:-1]
        usage = ',"usage":null' if self._request.include_usage else ""
        self._envelope = f"data: {envelope},"
        self._head = self._envelope + '"choices":[{"index":0,"delta":'
        self._tail = ',"logprobs":null,"finish_reason":null}]' + usage + "}\n\n"

    def _chunk(self, delta: str) -> bytes:
        return (self._head + delta + self._tail).encode("ascii")

    def _start(self, event: Start) -> bytes:
        self._set_id(event.id)
        return self._chunk('{"role":"assistant","content":""}')

    def _part_start(self, event: PartStart) -> bytes:
        part = event.part
        self._kinds[event.index] = type(part)
        if not isinstance(part, ToolCall):
            return b""
        place = self._tool_index[event.index] = len(self._tool_index)
        self._unsent[event.index] = True
        if part.name in self._custom:           # sent whole at its end: the wrapping JSON is not what the client wants
            self._kinds[event.index] = Tool
            return b""
        return self._chunk(dumps({"tool_calls": [{"index": place, "id": part.id, "type": "function",
                                                  "function": {"name": part.name, "arguments": ""}}]}))

    def _part_delta(self, event: PartDelta) -> bytes:
        kind, text = self._kinds[event.index], dumps(event.text)
        if kind is Text:
            return self._chunk('{"content":' + text + "}")
        if kind is Thinking:
            return self._chunk('{"reasoning_content":' + text + "}")
        if kind is Tool:
            return b""
        self._unsent[event.index] = False
        return self._chunk('{"tool_calls":[{"index":%d,"function":{"arguments":%s}}]}'
                           % (self._tool_index[event.index], text))

    def _part_end(self, event: PartEnd) -> bytes:
        part = event.part
        if isinstance(part, Thinking) and part.signature:
            return self._chunk(dumps({"reasoning_details": reasoning_details(part)}))
        if not isinstance(part, ToolCall):
            return b""
        place = self._tool_index[event.index]
        if self._kinds[event.index] is Tool:
            return self._chunk(dumps({"tool_calls": [{"index": place, **chat_tool_call(part, self._custom)}]}))
        if self._unsent[event.index]:           # clients parse the joined fragments, and "" is not JSON
            return self._part_delta(PartDelta(event.index, "{}"))
        return b""

    def _done(self, event: Done) -> bytes:
        refusal = b""
        if event.stop_reason == "refusal" and event.detail:
            refusal = self._chunk(dumps({"refusal": event.detail}))
        finish = f'{{}},"logprobs":null,"finish_reason":"{CHAT_FINISH[event.stop_reason]}"}}]'
        out = self._head + finish + (',"usage":null}\n\n' if self._request.include_usage else "}\n\n")
        if self._request.include_usage:
            out += self._envelope + f'"choices":[],"usage":{dumps(chat_usage(event.usage))}}}\n\n'
        return refusal + out.encode("ascii") + b"data: [DONE]\n\n"

    def _failed(self, event: Failed) -> bytes:
        return CHAT.error_event(event.error, self._stamp.request_id)

    handlers = {Start: _start, PartStart: _part_start, PartDelta: _part_delta, PartEnd: _part_end, Done: _done,
                Failed: _failed}


# --- OpenAI's legacy Completions --------------------------------------------------------------------------------------

TEXT_FINISH = {**CHAT_FINISH, "tool_use": "stop"}
TEXT_FIELDS: Dict[str, Tuple[str, Optional[float], Optional[float]]] = {
    **{name: CHAT_FIELDS[name] for name in ("temperature", "top_p", "top_k", "seed", "frequency_penalty",
                                            "presence_penalty", "logit_bias", "n", "user", "stream", "stream_options")},
    "max_tokens": ("an integer", 0, None), "best_of": ("an integer", 0, None), "echo": ("a boolean", None, None),
    "suffix": ("a string", None, None)}
TEXT_DEFAULTS: Dict[str, Any] = {
    **{name: CHAT_DEFAULTS[name] for name in ("n", "logit_bias", "frequency_penalty", "presence_penalty", "top_p",
                                              "stop")}, "best_of": 1, "echo": False, "suffix": ""}
TEXT_REFUSALS = {
    "n": CHAT_REFUSALS["n"], "best_of": CHAT_REFUSALS["n"], "logprobs": CHAT_REFUSALS["logprobs"],
    "echo": "this model does not repeat the prompt", "suffix": "this model cannot fill in what stands before a text"}
TEXT_KNOWN = frozenset({"model", "prompt", "stream", "stream_options", "max_tokens", "temperature", "top_p", "top_k",
                        "stop", "seed", "frequency_penalty", "presence_penalty", "logit_bias", "user"})


def texts_or_tokens(data: Mapping[str, Any], name: str) -> List[Any]:
    """The texts (strings) or token lists of a field that holds one or several of either. Raises `BadRequest`."""
    value = data.get(name)
    if value is None:
        raise missing_field(name)
    if isinstance(value, str):
        return [value]
    if not isinstance(value, list) or not value:
        raise BadRequest(f"{name}: must be a string or an array that is not empty", code="invalid_type", param=name)
    if _is_tokens(value):
        return [value]
    for index, item in enumerate(value):
        if not isinstance(item, str) and not _is_tokens(item):
            raise BadRequest(f"{name}[{index}]: must be a string or an array of tokens", code="invalid_type",
                             param=f"{name}[{index}]")
    return value


def _is_tokens(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(map(_KINDS["an integer"], value))


class OpenAITexts(OpenAIChat):
    """OpenAI's legacy Completions: POST /v1/completions. Translated, the prompt is what a user says."""

    name = "openai-texts"

    def parse(self, data: Dict[str, Any]) -> Request:
        """See `ClientProtocol.parse`."""
        notes = Notes()
        fields = {name: optional(data, name, kind, "", low, high) for name, (kind, low, high) in TEXT_FIELDS.items()}
        said = {name: None if value == TEXT_DEFAULTS.get(name, self) else value for name, value in fields.items()}
        model = required(data, "model", "a string")
        messages = self._prompt(data, notes)
        if fields["max_tokens"] == 0:
            notes.refused.append(("max_tokens", "this model writes at least one token"))
        extra = extra_fields(data, TEXT_KNOWN, TEXT_DEFAULTS, TEXT_REFUSALS, notes)
        return Request(
            model=model, messages=messages, stop=self._stop(data.get("stop")), stream=bool(fields["stream"]),
            include_usage=bool((fields["stream_options"] or {}).get("include_usage")), protocol=self.name, extra=extra,
            refused=tuple(notes.refused), data=data,
            **{name: said[name] for name in ("max_tokens", "temperature", "top_p", "top_k", "seed", "frequency_penalty",
                                             "presence_penalty", "logit_bias", "user")})

    def _prompt(self, data: Dict[str, Any], notes: Notes) -> Tuple[Message, ...]:
        prompts = texts_or_tokens(data, "prompt")
        if len(prompts) == 1 and isinstance(prompts[0], str) and prompts[0]:
            return (Message("user", (Text(prompts[0]),)),)
        notes.refused.append(("prompt", "this model takes one prompt, as text that is not empty"))
        return ()

    def render(self, request: Request, reply: Reply, stamp: Stamp) -> Dict[str, Any]:
        """A text_completion object."""
        text = "".join(part.text for part in reply.parts if isinstance(part, Text))
        return {**text_envelope(request, stamp), "choices": [text_choice(text, TEXT_FINISH[reply.stop_reason])],
                "usage": chat_usage(reply.usage)}

    def writer(self, request: Request, stamp: Stamp) -> Writer:
        """See `ClientProtocol.writer`."""
        return TextWriter(request, stamp)


def text_id(provider_id: str, stamp: Stamp) -> str:
    """The provider's id if it has the form that clients expect, else a new one."""
    return provider_id if provider_id.startswith("cmpl-") else "cmpl-" + stamp.id


def text_envelope(request: Request, stamp: Stamp) -> Dict[str, Any]:
    """What all text_completion objects of an answer share."""
    return {"id": text_id("", stamp), "object": "text_completion", "created": stamp.created, "model": request.model,
            "system_fingerprint": FINGERPRINT}


def text_choice(text: str, finish_reason: Optional[str] = None) -> Dict[str, Any]:
    """A choice of a text_completion object."""
    return {"text": text, "index": 0, "logprobs": None, "finish_reason": finish_reason}


class TextWriter(Writer):
    """Events → text_completion frames. Only visible text has a place in them."""

    def __init__(self, request: Request, stamp: Stamp) -> None:
        self._request = request
        self._stamp = stamp
        self._envelope = text_envelope(request, stamp)
        self._texts: set[int] = set()

    def _frame(self, *choices: Dict[str, Any], usage: Optional[Dict[str, Any]] = None) -> bytes:
        said = {"usage": usage} if self._request.include_usage else {}
        return sse({**self._envelope, "choices": choices, **said})

    def _part_start(self, event: PartStart) -> bytes:
        if isinstance(event.part, Text):
            self._texts.add(event.index)
        return b""

    def _part_delta(self, event: PartDelta) -> bytes:
        return self._frame(text_choice(event.text)) if event.index in self._texts else b""

    def _done(self, event: Done) -> bytes:
        out = self._frame(text_choice("", TEXT_FINISH[event.stop_reason]))
        if self._request.include_usage:
            out += self._frame(usage=chat_usage(event.usage))
        return out + b"data: [DONE]\n\n"

    def _nothing(self, event: Event) -> bytes:
        return b""

    def _failed(self, event: Failed) -> bytes:
        return TEXTS.error_event(event.error, self._stamp.request_id)

    handlers = {Start: _nothing, PartStart: _part_start, PartDelta: _part_delta, PartEnd: _nothing, Done: _done,
                Failed: _failed}


# --- OpenAI Embeddings ------------------------------------------------------------------------------------------------

EMBEDDING_FORMATS = ("float", "base64")


class OpenAIEmbeddings(OpenAIChat):
    """OpenAI Embeddings: POST /v1/embeddings. No conversation: an `EmbeddingLane` works on the fields as they came."""

    name = "openai-embeddings"

    def parse(self, data: Dict[str, Any]) -> Request:
        """See `ClientProtocol.parse`."""
        model = required(data, "model", "a string")
        texts_or_tokens(data, "input")
        optional(data, "dimensions", "an integer", low=1)
        optional(data, "user", "a string")
        if data.get("encoding_format") not in (None, *EMBEDDING_FORMATS):
            raise BadRequest("encoding_format: must be float or base64", param="encoding_format")
        return Request(model=model, messages=(), protocol=self.name, data=data)


# --- Anthropic Messages -----------------------------------------------------------------------------------------------

ANTHROPIC_ID_LIMIT = 64     # tool ids match ^[a-zA-Z0-9_-]{1,64}$ (Messages API, tool_use), also when they come back
MESSAGES_STOP = {"stop": "end_turn", "length": "max_tokens", "tool_use": "tool_use", "stop_sequence": "stop_sequence",
                 "refusal": "refusal", "pause": "pause_turn", "overflow": "model_context_window_exceeded"}
MESSAGES_CHOICES = {"auto": "auto", "any": "required", "none": "none", "tool": "tool"}
STRAY_FIELDS = ("effort", "reasoning")      # levels of thinking that only `stray_effort` knows; Anthropic refuses them
MESSAGES_KNOWN = frozenset({
    "model", "messages", "max_tokens", "system", "tools", "tool_choice", "thinking", "output_config", "output_format",
    "temperature", "top_p", "top_k", "stop_sequences", "stream", "metadata", "thread", *STRAY_FIELDS})
MESSAGES_DEFAULTS: Dict[str, Any] = {"service_tier": "auto"}
MESSAGES_REFUSALS = {"mcp_servers": "MCP servers run on Anthropic's side only", "container":
                     "containers exist on Anthropic's side only"}
# Claude Code's first system block: accounting for Anthropic. It differs from request to request, which would keep every
# other provider from ever finding the prompt in its cache, so it only goes to Anthropic (where bodies pass as they are).
BILLING_LINE = "x-anthropic-billing-header:"
# Tools that the client itself runs and whose schema only Claude models know; the other schema-less tools run at Anthropic.
CLIENT_TOOLS = ("bash_", "text_editor_", "computer_", "memory_", "browser_toolset_")


class AnthropicClient(ClientProtocol):
    """Anthropic Messages: POST /v1/messages and /v1/messages/count_tokens, every API version."""

    name = "anthropic-messages"
    heartbeat = sse({"type": "ping"}, "ping")
    wants_objects = True
    field_names = {"stop": "stop_sequences", "parallel_tools": "tool_choice.disable_parallel_tool_use",
                   "reasoning": "thinking", "output": "output_config.format", "user": "metadata.user_id"}
    error_types = {
        GatewayError: (None, "api_error"), BadRequest: (None, "invalid_request_error"),
        ModelNotFound: (None, "not_found_error"), RouteNotFound: (None, "not_found_error"),
        Conflict: (None, "conflict_error"), BodyTooLarge: (None, "request_too_large"),
        Unauthorized: (None, "authentication_error"), Forbidden: (None, "permission_error"),
        ShuttingDown: (529, "overloaded_error"),
        UpstreamError: (None, "api_error"), RateLimited: (None, "rate_limit_error"),
        QuotaExceeded: (402, "billing_error"), Overloaded: (529, "overloaded_error"),
        UpstreamTimeout: (None, "timeout_error"),
    }

    def parse(self, data: Dict[str, Any]) -> Request:
        """See `ClientProtocol.parse`; fields by Anthropic's API versions 2023-06-01 and 2026-10-21."""
        required(data, "max_tokens", "an integer", low=1)
        return self.parse_prompt(data)

    def parse_prompt(self, data: Dict[str, Any]) -> Request:
        """The same for count_tokens, which has no max_tokens."""
        notes = Notes()
        if data.get("thread") is not None:
            # Threads live on Anthropic's servers. SDK tool runners fall back to whole conversations on this code only.
            raise BadRequest("thread: message threads need a server that keeps conversations; send all messages",
                             code="thread_unsupported_request", param="thread")
        model = required(data, "model", "a string")
        system = self._system(data.get("system"), notes)
        messages = self._messages(required(data, "messages", "an array"), notes)
        tools = self._tools(optional(data, "tools", "an array") or [], notes)
        tool_choice, parallel = self._tool_choice(optional(data, "tool_choice", "an object"), tools, notes)
        config = optional(data, "output_config", "an object") or {}
        metadata = optional(data, "metadata", "an object") or {}
        extra = self._extra(data, config, notes)
        return Request(
            model=model, messages=tuple(messages), system=system, tools=tuple(tools), tool_choice=tool_choice,
            parallel_tools=parallel, max_tokens=optional(data, "max_tokens", "an integer"),
            temperature=optional(data, "temperature", "a number", "", 0, 2),
            top_p=self._top_p(optional(data, "top_p", "a number", "", 0, 1)),
            top_k=optional(data, "top_k", "an integer", "", 0),
            stop=self._stop(optional(data, "stop_sequences", "an array") or []),
            reasoning=self._reasoning(optional(data, "thinking", "an object"), config, stray_effort(data)),
            output=self._output(config.get("format") or data.get("output_format")),
            user=optional(metadata, "user_id", "a string", "metadata"),
            stream=bool(optional(data, "stream", "a boolean")), include_usage=True, protocol=self.name, extra=extra,
            lost=tuple(notes.lost), refused=tuple(notes.refused), images=tuple(notes.images), data=data)

    def _extra(self, data: Dict[str, Any], config: Dict[str, Any], notes: Notes) -> Dict[str, Any]:
        extra = {}
        for name, value in data.items():
            if name in MESSAGES_KNOWN or value in (None, [], {}) or value == MESSAGES_DEFAULTS.get(name, self):
                continue
            if name in MESSAGES_REFUSALS:
                notes.refused.append((name, MESSAGES_REFUSALS[name]))
            else:
                extra[name] = value
        for name in config:
            if name not in ("effort", "format"):
                notes.lose(f"output_config.{name}")
        return extra

    def _stop(self, texts: List[Any]) -> Tuple[str, ...]:
        return tuple(check(text, "a string", f"stop_sequences[{index}]") for index, text in enumerate(texts))

    def _top_p(self, value: Optional[float]) -> Optional[float]:
        return None if value == 1 else value    # all of it is what "not said" means

    def _reasoning(self, thinking: Optional[Dict[str, Any]], config: Dict[str, Any],
                   stray: Optional[str]) -> Optional[Reasoning]:
        effort = optional(config, "effort", "a string", "output_config")
        level = stray or LEVEL_ALIASES.get((effort or "").lower())
        if thinking is None:
            return Reasoning(level) if level else None
        kind = required(thinking, "type", "a string", "thinking")
        if kind == "disabled":
            return Reasoning(stray or "off")
        if kind == "enabled":
            budget = required(thinking, "budget_tokens", "an integer", "thinking", 1)
            return Reasoning(level or level_of_budget(budget), None if stray else budget)
        if kind == "adaptive":
            return Reasoning(level or "high")
        if kind == "between_tools":
            return Reasoning(level or "low")
        raise BadRequest("thinking.type: must be enabled, adaptive, between_tools or disabled", param="thinking.type")

    def _output(self, value: Any) -> Optional[OutputFormat]:
        if value is None:
            return None
        path = "output_config.format"
        kind = required(check(value, "an object", path), "type", "a string", path)
        if kind.lower() != "json_schema":
            raise BadRequest(f"{path}.type: must be json_schema", param=f"{path}.type")
        return OutputFormat(required(value, "schema", "an object", path), strict=True)

    def _tools(self, items: Sequence[Any], notes: Notes) -> List[Tool]:
        tools = []
        for path, item in objects(items, "tools"):
            kind = optional(item, "type", "a string", path) or "custom"
            if kind == "custom" or "input_schema" in item:
                tools.append(Tool(required(item, "name", "a string", path), optional(item, "description", "a string", path),
                                  required(item, "input_schema", "an object", path),
                                  optional(item, "strict", "a boolean", path)))
            elif kind.startswith(CLIENT_TOOLS):
                notes.refused.append((path, f"the tool type {kind[:60]} has a schema that only Claude models know"))
            else:
                notes.lose(path)
            if item.get("cache_control") is not None:
                notes.lose("cache_control")
        return tools

    def _tool_choice(self, value: Optional[Dict[str, Any]], tools: Sequence[Tool], notes: Notes,
                     ) -> Tuple[Optional[ToolChoice], Optional[bool]]:
        if value is None:
            return None, None
        kind = required(value, "type", "a string", "tool_choice")
        if kind not in MESSAGES_CHOICES:
            raise BadRequest("tool_choice.type: must be auto, any, tool or none", param="tool_choice.type")
        name = required(value, "name", "a string", "tool_choice") if kind == "tool" else None
        if name is not None and name not in {tool.name for tool in tools}:
            notes.refused.append(("tool_choice.name", f"there is no tool {name!r} that this model can call"))
        parallel = False if optional(value, "disable_parallel_tool_use", "a boolean", "tool_choice") else None
        return ToolChoice(MESSAGES_CHOICES[kind], name), parallel

    def _system(self, value: Any, notes: Notes) -> Tuple[Text, ...]:
        if value is None:
            return ()
        if isinstance(value, str):
            return (Text(value),)
        blocks = self.content(value, "system", notes)
        return tuple(block for block in blocks if isinstance(block, Text) and not block.text.startswith(BILLING_LINE))

    def _messages(self, items: Sequence[Any], notes: Notes) -> List[Message]:
        if not items:
            raise BadRequest("messages: at least one message is required", param="messages")
        messages: List[Message] = []
        for path, item in objects(items, "messages"):
            role = required(item, "role", "a string", path)
            if role not in ("user", "assistant", "system"):
                raise BadRequest(f"{path}.role: must be user, assistant or system, not {role[:40]!r}",
                                 param=f"{path}.role")
            content = item.get("content")
            if content is None:
                raise missing_field(f"{path}.content")
            parts = self.content(content, f"{path}.content", notes)
            results = tuple(part for part in parts if isinstance(part, ToolResult))
            rest = tuple(part for part in parts if not isinstance(part, ToolResult))
            if results:
                messages.append(Message("tool", results))
            if rest or not results:
                messages.append(Message(role, rest))
        return messages

    def content(self, content: Any, path: str, notes: Notes) -> Tuple[Part, ...]:
        """A string or an array of blocks as parts."""
        if isinstance(content, str):
            return (Text(content),) if content else ()
        if not isinstance(content, list):
            raise BadRequest(f"{path}: must be a string or an array of blocks", code="invalid_type", param=path)
        parts: List[Part] = []
        for where, block in objects(content, path):
            kind = required(block, "type", "a string", where)
            if block.get("cache_control") is not None:
                notes.lose("cache_control")
            if kind in self.blocks:
                parts.extend(self.blocks[kind](self, block, where, notes))
            elif kind in self.server_blocks or kind.endswith("_tool_result"):
                notes.lose(where)
            else:
                notes.refused.append((f"{where}.type", f"content of type {kind[:40]!r} cannot go to this model"))
        return tuple(parts)

    def _text(self, block: Dict[str, Any], path: str, notes: Notes) -> List[Part]:
        if block.get("citations"):
            notes.lose(f"{path}.citations")
        return [Text(required(block, "text", "a string", path))]

    def _source(self, block: Dict[str, Any], path: str) -> Tuple[str, Dict[str, Any], str]:
        source = required(block, "source", "an object", path)
        where = f"{path}.source"
        return required(source, "type", "a string", where), source, where

    def _image(self, block: Dict[str, Any], path: str, notes: Notes) -> List[Part]:
        kind, source, where = self._source(block, path)
        notes.images.append(path)
        if kind == "base64":
            media_type = required(source, "media_type", "a string", where)
            return [Image(media_type, check_base64(required(source, "data", "a string", where), f"{where}.data"))]
        if kind == "url":
            return [Image(url=check_url(required(source, "url", "a string", where), f"{where}.url"))]
        notes.refused.append((f"{where}.type", f"an image source of type {kind[:40]!r} cannot go to this model"))
        return []

    def _document(self, block: Dict[str, Any], path: str, notes: Notes) -> List[Part]:
        kind, source, where = self._source(block, path)
        title = optional(block, "title", "a string", path)
        heading = [Text(text) for text in (title, optional(block, "context", "a string", path)) if text]
        if kind == "text":
            return [*heading, Text(required(source, "data", "a string", where))]
        if kind == "content":
            return [*heading, *self.content(source.get("content") or "", f"{where}.content", notes)]
        if kind == "base64":
            payload = check_base64(required(source, "data", "a string", where), f"{where}.data")
            return [*heading[1:], Document(source.get("media_type") or "application/pdf", payload, name=title)]
        if kind == "url":
            url = check_url(required(source, "url", "a string", where), f"{where}.url")
            return [*heading[1:], Document(url=url, name=title)]
        notes.refused.append((f"{where}.type", f"a document source of type {kind[:40]!r} cannot go to this model"))
        return []

    def _search_result(self, block: Dict[str, Any], path: str, notes: Notes) -> List[Part]:
        heading = " ".join(str(block[name]) for name in ("title", "source") if isinstance(block.get(name), str))
        return [Text(heading), *self.content(block.get("content") or "", f"{path}.content", notes)]

    def _thinking(self, block: Dict[str, Any], path: str, notes: Notes) -> List[Part]:
        signature, maker, origin = unseal(optional(block, "signature", "a string", path), self.name)
        return [Thinking(required(block, "thinking", "a string", path), signature, False, maker if signature else "", origin)]

    def _redacted(self, block: Dict[str, Any], path: str, notes: Notes) -> List[Part]:
        signature, maker, origin = unseal(required(block, "data", "a string", path), self.name)
        return [Thinking("", signature, True, maker, origin)]

    def _tool_use(self, block: Dict[str, Any], path: str, notes: Notes) -> List[Part]:
        arguments = json_text(required(block, "input", "an object", path))
        return [ToolCall(required(block, "id", "a string", path), required(block, "name", "a string", path), arguments)]

    def _tool_result(self, block: Dict[str, Any], path: str, notes: Notes) -> List[Part]:
        content = block.get("content")
        parts = () if content is None else self.content(content, f"{path}.content", notes)
        return [ToolResult(required(block, "tool_use_id", "a string", path), parts,
                           bool(optional(block, "is_error", "a boolean", path)))]

    def _tool_reference(self, block: Dict[str, Any], path: str, notes: Notes) -> List[Part]:
        return [Text(f"The tool {required(block, 'tool_name', 'a string', path)} is now available.")]

    def _compaction(self, block: Dict[str, Any], path: str, notes: Notes) -> List[Part]:
        text = optional(block, "content", "a string", path)
        if text is None:
            notes.lose(path)
        return [Text(text)] if text else []

    blocks: Mapping[str, Callable[..., List[Part]]] = {
        "text": _text, "image": _image, "document": _document, "search_result": _search_result, "thinking": _thinking,
        "redacted_thinking": _redacted, "tool_use": _tool_use, "tool_result": _tool_result,
        "tool_reference": _tool_reference, "compaction": _compaction}
    # Halves of what ran on Anthropic's servers; their meaning is in the text around them.
    server_blocks = frozenset({"server_tool_use", "mcp_tool_use", "mcp_tool_listing", "fallback", "container_upload",
                               "tool_addition", "tool_removal"})

    def render(self, request: Request, reply: Reply, stamp: Stamp) -> Dict[str, Any]:
        """A message object."""
        parts = without_last_seal(visible_parts(request, reply.parts))
        content = [block for part in parts for block in self._render_part(part)]
        return {"id": message_id(reply.id, stamp), "type": "message", "role": "assistant", "model": request.model,
                "content": content, **stop_fields(reply.stop_reason, reply.detail),
                "usage": messages_usage(reply.usage)}

    def _render_part(self, part: Part) -> List[Dict[str, Any]]:
        if isinstance(part, Text):
            return [{"type": "text", "text": part.text}] if part.text else []
        if isinstance(part, Thinking):
            if part.redacted:
                return [{"type": "redacted_thinking", "data": seal(part, self.name)}]
            return [{"type": "thinking", "thinking": part.text, "signature": seal(part, self.name)}]
        if isinstance(part, ToolCall):
            return [{"type": "tool_use", "id": fit_id(part.id, ANTHROPIC_ID_LIMIT), "name": part.name,
                     "input": loads(part.arguments or "{}")}]        # an object: see `SoundCalls`
        return []

    def writer(self, request: Request, stamp: Stamp) -> Writer:
        """See `ClientProtocol.writer`."""
        return MessagesWriter(request, stamp)

    def render_error(self, error: GatewayError, request_id: str) -> Tuple[int, Dict[str, Any]]:
        """The envelope {"type": "error", "error": {type, message}, "request_id"}."""
        status, word = self.classify(error)
        message = error.message
        if isinstance(error, ContextOverflow) and not message.startswith("prompt is too long"):
            message = f"prompt is too long: {overflow_figures(message)}{message}"   # the words at which Claude Code compacts
        body: Dict[str, Any] = {"type": word, "message": message}
        if error.named_code:
            body["details"] = {"error_code": error.named_code}
        return status, {"type": "error", "error": body, "request_id": request_id}

    def error_event(self, error: GatewayError, request_id: str) -> bytes:
        """An `error` event."""
        return sse(self.render_error(error, request_id)[1], "error")


def overflow_figures(message: str) -> str:
    """The two token counts in a provider's complaint in Anthropic's words: Claude Code then knows how much to leave out."""
    counts = sorted({int(text.replace(",", "")) for text in re.findall(r"\b\d{4,9}\b|\b\d{1,3}(?:,\d{3})+\b", message)})
    return f"{counts[1]} tokens > {counts[0]} maximum: " if len(counts) == 2 else ""


def visible_parts(request: Request, parts: Iterable[Part]) -> List[Part]:
    """The parts to show: without thinking when structured output was asked for, since clients that do so read the first
    block as JSON."""
    return [part for part in parts if not (request.output and isinstance(part, Thinking))]


def is_seal(part: Part) -> bool:
    """Whether this is thinking of which the client sees nothing."""
    return isinstance(part, Thinking) and part.redacted


def without_last_seal(parts: List[Part]) -> List[Part]:
    """The parts, not ending in a seal behind text: Claude Code takes the last block for the whole answer. At the end of a
    turn no provider insists on having it back."""
    ends = len(parts) > 1 and is_seal(parts[-1]) and isinstance(parts[-2], Text)
    return parts[:-1] if ends else parts


def message_id(provider_id: str, stamp: Stamp) -> str:
    """The provider's id if it has the form that clients expect, else a new one."""
    return provider_id if provider_id.startswith("msg_") else "msg_" + stamp.id


def messages_usage(usage: Usage) -> Dict[str, Any]:
    """Usage in Anthropic's terms: input_tokens excludes cached tokens."""
    counts: Dict[str, Any] = {
        "input_tokens": usage.input, "cache_creation_input_tokens": usage.cache_write,
        "cache_read_input_tokens": usage.cache_read, "output_tokens": usage.output}
    if usage.reasoning:
        counts["output_tokens_details"] = {"thinking_tokens": usage.reasoning}
    return counts


def stop_fields(stop_reason: str, detail: Optional[str]) -> Dict[str, Any]:
    """stop_reason and what belongs to it."""
    fields: Dict[str, Any] = {"stop_reason": MESSAGES_STOP[stop_reason],
                              "stop_sequence": detail if stop_reason == "stop_sequence" else None}
    if stop_reason == "refusal" and detail:
        fields["stop_details"] = {"type": "refusal", "category": None, "explanation": detail}
    return fields


class MessagesWriter(SerialWriter):
    """Events → Anthropic's server-sent events. Blocks are numbered in the order they are opened."""

    def __init__(self, request: Request, stamp: Stamp) -> None:
        super().__init__(request, stamp)
        self._block = -1                        # the client's index of the open block
        self._is_text = False                   # that or the last one
        self._seal: Optional[Part] = None       # one behind text, see `without_last_seal`: sent before what follows

    def _start(self, event: Start) -> bytes:
        usage = messages_usage(event.usage or Usage(estimate_tokens(self._request)))
        message = {"id": message_id(event.id, self._stamp), "type": "message", "role": "assistant",
                   "model": self._request.model, "content": [], "stop_reason": None, "stop_sequence": None,
                   "usage": usage}
        return sse({"type": "message_start", "message": message}, "message_start")

    def hides(self, part: Part) -> bool:
        """See `SerialWriter.hides`."""
        if not visible_parts(self._request, [part]):
            return True
        self._seal = part if is_seal(part) and self._is_text else self._seal
        return part is self._seal

    def begin(self, part: Part) -> bytes:
        """See `SerialWriter.begin`."""
        held, self._seal = self._seal, None
        before = self.begin(held) + self.finish(held) if held else b""
        self._is_text = isinstance(part, Text)
        self._block += 1
        block: Dict[str, Any] = {"type": "text", "text": ""}
        if isinstance(part, Thinking):
            block = {"type": "thinking", "thinking": "", "signature": ""}
            if part.redacted:
                block = {"type": "redacted_thinking", "data": seal(part, AnthropicClient.name)}
        elif isinstance(part, ToolCall):
            block = {"type": "tool_use", "id": fit_id(part.id, ANTHROPIC_ID_LIMIT), "name": part.name, "input": {}}
        self._delta_head = ('event: content_block_delta\ndata: {"type":"content_block_delta","index":%d,"delta":%s'
                            % (self._block, self._DELTAS[type(part)]))
        return before + sse({"type": "content_block_start", "index": self._block, "content_block": block},
                            "content_block_start")

    _DELTAS = {Text: '{"type":"text_delta","text":', Thinking: '{"type":"thinking_delta","thinking":',
               ToolCall: '{"type":"input_json_delta","partial_json":'}

    def piece(self, text: str) -> bytes:
        """See `SerialWriter.piece`."""
        return (self._delta_head + dumps(text) + "}}\n\n").encode("ascii")

    def finish(self, part: Part) -> bytes:
        """See `SerialWriter.finish`."""
        out = b""
        if isinstance(part, Thinking) and part.signature and not part.redacted:
            delta = {"type": "signature_delta", "signature": seal(part, AnthropicClient.name)}
            out = sse({"type": "content_block_delta", "index": self._block, "delta": delta}, "content_block_delta")
        return out + sse({"type": "content_block_stop", "index": self._block}, "content_block_stop")

    def _done(self, event: Done) -> bytes:
        delta = {"type": "message_delta", "delta": stop_fields(event.stop_reason, event.detail),
                 "usage": messages_usage(event.usage)}
        return sse(delta, "message_delta") + sse({"type": "message_stop"}, "message_stop")

    def _failed(self, event: Failed) -> bytes:
        return MESSAGES.error_event(event.error, self._stamp.request_id)

    handlers = {Start: _start, PartStart: SerialWriter.part_start, PartDelta: SerialWriter.part_delta,
                PartEnd: SerialWriter.part_end, Done: _done, Failed: _failed}


# --- OpenAI Responses -------------------------------------------------------------------------------------------------

RESPONSES_END: Dict[str, Tuple[str, Optional[str]]] = {     # stop reason → status, and why it is incomplete
    "stop": ("completed", None), "stop_sequence": ("completed", None), "tool_use": ("completed", None),
    "pause": ("completed", None), "length": ("incomplete", "max_output_tokens"),
    "overflow": ("incomplete", "max_output_tokens"), "refusal": ("incomplete", "content_filter")}
# The codes of a failed response that Codex and OpenAI's SDKs tell apart; anything else is a server_error.
RESPONSES_FAILURES: Tuple[Tuple[Type[GatewayError], str], ...] = (
    (ContextOverflow, "context_length_exceeded"), (QuotaExceeded, "insufficient_quota"),
    (RateLimited, "rate_limit_exceeded"), (Overloaded, "server_is_overloaded"), (ShuttingDown, "server_is_overloaded"),
    (BadRequest, "invalid_prompt"))
# Scalar request fields, as `CHAT_FIELDS`.
RESPONSES_FIELDS: Dict[str, Tuple[str, Optional[float], Optional[float]]] = {
    "instructions": ("a string", None, None), "tools": ("an array", None, None), "text": ("an object", None, None),
    "parallel_tool_calls": ("a boolean", None, None), "reasoning": ("an object", None, None),
    "max_output_tokens": ("an integer", 1, None), "max_tool_calls": ("an integer", 0, None),
    "temperature": ("a number", 0, 2), "top_p": ("a number", 0, 1), "top_logprobs": ("an integer", 0, 20),
    "stream": ("a boolean", None, None), "stream_options": ("an object", None, None),
    "store": ("a boolean", None, None), "include": ("an array", None, None), "truncation": ("a string", None, None),
    "metadata": ("an object", None, None), "user": ("a string", None, None),
    "safety_identifier": ("a string", None, None), "service_tier": ("a string", None, None),
    "prompt_cache_key": ("a string", None, None), "background": ("a boolean", None, None),
    "previous_response_id": ("a string", None, None),
}
RESPONSES_DEFAULTS: Dict[str, Any] = {
    "top_logprobs": 0, "metadata": {}, "service_tier": "auto", "truncation": "disabled", "background": False,
    "top_p": 1}
RESPONSES_REFUSALS = {"top_logprobs": "log probabilities are not available on this model"}
RESPONSES_KNOWN = frozenset({
    "model", "input", "instructions", "tools", "tool_choice", "parallel_tool_calls", "max_output_tokens",
    "max_tool_calls", "temperature", "top_p", "text", "reasoning", "stream", "stream_options", "store", "include",
    "user", "safety_identifier"})
# What only a server can do that keeps conversations: field → (code, what to do instead). No lane has it.
RESPONSES_KEPT = {
    "previous_response_id": ("previous_response_not_found", "no response is kept here; send the whole conversation"),
    "conversation": ("unsupported_parameter", "no conversation is kept here; send the whole of it in input"),
    "background": ("unsupported_parameter", "no response is kept here, so that it could not be fetched later"),
    "prompt": ("unsupported_parameter", "prompt templates live on OpenAI's servers; send instructions and input")}
RESPONSES_ROLES = {"user": "user", "assistant": "assistant", "system": "system", "developer": "system"}
# Tools that the client itself runs and whose schema only OpenAI's models know, and those that run at OpenAI with what
# the client has set up; other built-in tools are extras that a translated request goes without.
RESPONSES_OWN_TOOLS = ("local_shell", "shell", "apply_patch", "computer", "mcp")
# Calls of such tools in a conversation: item type → (the tool's name, the field with its arguments).
RESPONSES_OWN_CALLS = {"local_shell_call": ("local_shell", "action"), "shell_call": ("shell", "action"),
                       "apply_patch_call": ("apply_patch", "operation")}
RESPONSES_OWN_RESULTS = tuple(kind + "_output" for kind in RESPONSES_OWN_CALLS)
# Items of what ran on OpenAI's servers; their meaning is in the text around them. Tool lists are read apart.
RESPONSES_SERVER_ITEMS = frozenset({
    "web_search_call", "file_search_call", "computer_call", "computer_call_output", "image_generation_call",
    "code_interpreter_call", "mcp_call", "mcp_list_tools", "mcp_approval_request", "mcp_approval_response", "program",
    "program_output", "tool_search_call", "tool_search_output", "additional_tools", "configuration_update"})


class ResponsesClient(OpenAIClient):
    """OpenAI Responses: POST /v1/responses. Nothing is stored, whatever `store` says."""

    name = "openai-responses"
    field_names = {"parallel_tools": "parallel_tool_calls", "max_tokens": "max_output_tokens", "output": "text.format",
                   "verbosity": "text.verbosity", "messages": "input"}

    def parse(self, data: Dict[str, Any]) -> Request:
        """See `ClientProtocol.parse`; fields by the OpenAI API description, 2.3.0."""
        if data.get("input") is None and not any(data.get(name) for name in RESPONSES_KEPT):
            raise missing_field("input")
        return self.parse_prompt(data)

    def parse_prompt(self, data: Dict[str, Any]) -> Request:
        """The same for input_tokens, which needs no input."""
        notes = Notes()
        model = required(data, "model", "a string")
        fields = checked_fields(data, RESPONSES_FIELDS)
        said = without_defaults(fields, RESPONSES_DEFAULTS)
        for name, (code, advice) in RESPONSES_KEPT.items():
            if data.get(name) not in (None, False):
                raise BadRequest(f"{name}: {advice}", code=code, param=name)
        turns = self._turns(data.get("input"), notes)
        leading = next((place for place, turn in enumerate(turns) if turn.role != "system"), len(turns))
        named = {tool.name: tool for tool in (*self._tools(fields["tools"], "tools", notes),
                                              *self._added_tools(data.get("input"), notes))}
        tool_choice, tools = self._tool_choice(data.get("tool_choice"), list(named.values()), notes)
        text, instructions = fields["text"] or {}, [Text(fields["instructions"])] if fields["instructions"] else []
        self._lose_includes(fields["include"] or (), notes)
        extra = extra_fields(data, RESPONSES_KNOWN, RESPONSES_DEFAULTS, RESPONSES_REFUSALS, notes)
        return Request(
            model=model, messages=tuple(turns[leading:]), tools=tuple(tools), tool_choice=tool_choice,
            system=(*instructions, *leading_texts(turns[:leading])),
            max_tokens=fields["max_output_tokens"], temperature=said["temperature"], top_p=said["top_p"],
            reasoning=self._reasoning_level(fields["reasoning"] or {}, notes), output=self._output(text),
            verbosity=optional(text, "verbosity", "a string", "text"), user=said["user"] or said["safety_identifier"],
            parallel_tools=False if fields["parallel_tool_calls"] is False else None, stream=bool(fields["stream"]),
            include_usage=True, protocol=self.name, extra=extra, lost=tuple(notes.lost), refused=tuple(notes.refused),
            images=tuple(notes.images), seals=tuple(notes.seals), data=data)

    def _lose_includes(self, names: Sequence[Any], notes: Notes) -> None:
        for place, name in enumerate(names):
            if check(name, "a string", f"include[{place}]") != RESPONSES_SEAL:
                notes.lose(f"include[{place}]")

    def _reasoning_level(self, value: Dict[str, Any], notes: Notes) -> Optional[Reasoning]:
        """The effort as a level. Summaries are shown whether or not `summary` asks for them."""
        effort = optional(value, "effort", "a string", "reasoning")
        level = LEVEL_ALIASES.get((effort or "").lower())
        for name in value:
            if value[name] is not None and (name not in ("effort", "summary", "generate_summary")
                                            or name == "effort" and level is None):
                notes.lose(f"reasoning.{name}")
        return Reasoning(level) if level else None

    def _output(self, text: Dict[str, Any]) -> Optional[OutputFormat]:
        value, path = optional(text, "format", "an object", "text"), "text.format"
        kind = "text" if value is None else format_kind(value, path)
        if value is None or kind != "json_schema":
            return OutputFormat() if kind == "json_object" else None
        return schema_format(value, path)

    def _tools(self, items: Any, path: str, notes: Notes) -> Iterator[Tool]:
        for where, item in objects(items, path):
            kind = optional(item, "type", "a string", where) or "function"
            if kind == "function":
                yield function_tool(item, where)
            elif kind == "custom":
                yield custom_tool(item, item.get("format"), where)
            elif kind == "namespace":
                space = required(item, "name", "a string", where)
                for tool in self._tools(item.get("tools"), f"{where}.tools", notes):
                    yield replace(tool, name=spaced_name(space, tool.name), path=(space, tool.name))
            elif kind.startswith(RESPONSES_OWN_TOOLS):
                notes.refused.append((where, f"the tool type {kind[:60]} is for OpenAI's models only"))
            else:
                notes.lose(where)

    def _added_tools(self, items: Any, notes: Notes) -> Iterator[Tool]:
        """The tools that a conversation gained on its way, or that changed there."""
        for place, item in enumerate(items if isinstance(items, list) else ()):
            if item.get("type") in ("additional_tools", "tool_search_output"):
                yield from self._tools(item.get("tools"), f"input[{place}].tools", notes)

    def _tool_choice(self, value: Any, tools: List[Tool], notes: Notes) -> Tuple[Optional[ToolChoice], List[Tool]]:
        path = "tool_choice"
        if value is None:
            return None, tools
        if isinstance(value, str):
            return plain_choice(value, path), tools
        kind = required(check(value, "an object", path), "type", "a string", path)
        if kind in ("function", "custom"):
            return named_choice(required(value, "name", "a string", path), tools, f"{path}.name"), tools
        if kind == "allowed_tools":
            names = [optional(item, "name", "a string", where) or "" for where, item in
                     objects(value.get("tools"), f"{path}.tools")]
            return allowed_choice(value.get("mode"), names, tools)
        notes.refused.append((f"{path}.type", f"there is no tool {kind[:60]!r} that this model can call"))
        return None, tools

    def _turns(self, value: Any, notes: Notes) -> List[Message]:
        """The conversation in turns: items of the model that follow each other are one, and so are results."""
        if isinstance(value, str):
            return [Message("user", (Text(value),))]
        if value is not None and not isinstance(value, list):
            raise BadRequest("input: must be a string or an array of items", code="invalid_type", param="input")
        turns: List[Tuple[str, List[Part]]] = []
        for path, item in objects(value, "input"):
            turn = self._item(item, path, notes)
            if turn is None:
                continue
            if turns and turn.role in ("assistant", "tool") and turns[-1][0] == turn.role:
                turns[-1][1].extend(turn.parts)
            else:
                turns.append((turn.role, list(turn.parts)))
        return [Message(role, tuple(parts)) for role, parts in turns]

    def _item(self, item: Dict[str, Any], path: str, notes: Notes) -> Optional[Message]:
        kind = optional(item, "type", "a string", path)
        if kind is None and "role" not in item and "id" not in item:
            raise missing_field(f"{path}.type")
        kind = kind or ("message" if "role" in item else "item_reference")
        if kind in self.items:
            return self.items[kind](self, item, path, notes)
        if kind in RESPONSES_SERVER_ITEMS:
            notes.lose(path)
        else:
            notes.refused.append((f"{path}.type", f"an item of type {kind[:60]!r} cannot go to this model"))
        return None

    def _message(self, item: Dict[str, Any], path: str, notes: Notes) -> Message:
        role = required(item, "role", "a string", path)
        if role not in RESPONSES_ROLES:
            raise BadRequest(f"{path}.role: must be one of {', '.join(RESPONSES_ROLES)}, not {role[:40]!r}",
                             param=f"{path}.role")
        if item.get("content") is None:
            raise missing_field(f"{path}.content")
        return Message(RESPONSES_ROLES[role], self.content(item["content"], f"{path}.content", notes))

    def _reference(self, item: Dict[str, Any], path: str, notes: Notes) -> Message:
        raise BadRequest(f"{path}: no item is kept here that it could refer to; send the item itself (clients do so "
                         "when told to set store to false)", code="item_not_found", param=path)

    def _reasoning(self, item: Dict[str, Any], path: str, notes: Notes) -> Message:
        texts = {name: [required(part, "text", "a string", where) for where, part in
                        objects(item.get(name), f"{path}.{name}")] for name in ("summary", "content")}
        text = "\n\n".join(filter(None, texts["summary"])) or "\n\n".join(filter(None, texts["content"]))
        signature, maker, origin = unseal(optional(item, "encrypted_content", "a string", path), self.name)
        if maker != self.name:
            return Message("assistant", (open_thinking(text, signature, maker, origin),))
        if signature:
            notes.seals.append(signature)
        whole = seal_reasoning(item)
        thinking = Thinking(text, whole, not text, self.name) if whole else Thinking(text)
        return Message("assistant", (thinking,))

    def _call(self, item: Dict[str, Any], path: str, notes: Notes) -> Message:
        return self._called(item, path, call_arguments(item.get("arguments"), f"{path}.arguments"))

    def _custom_call(self, item: Dict[str, Any], path: str, notes: Notes) -> Message:
        return self._called(item, path, json_text({"input": optional(item, "input", "a string", path) or ""}))

    def _called(self, item: Dict[str, Any], path: str, arguments: str) -> Message:
        space, name = optional(item, "namespace", "a string", path), required(item, "name", "a string", path)
        name = spaced_name(space, name) if space else name
        return Message("assistant", (ToolCall(required(item, "call_id", "a string", path), name, arguments),))

    def _own_call(self, item: Dict[str, Any], path: str, notes: Notes) -> Message:
        name, field_name = RESPONSES_OWN_CALLS[item["type"]]
        arguments = json_text(optional(item, field_name, "an object", path) or {})
        return Message("assistant", (ToolCall(required(item, "call_id", "a string", path), name, arguments),))

    def _result(self, item: Dict[str, Any], path: str, notes: Notes) -> Message:
        output = item.get("output")
        parts = () if output is None else self.content(output, f"{path}.output", notes)
        return Message("tool", (ToolResult(required(item, "call_id", "a string", path), parts),))

    def _own_result(self, item: Dict[str, Any], path: str, notes: Notes) -> Message:
        """Of a tool of `RESPONSES_OWN_CALLS`; a local shell's names its call by `id`."""
        output = item.get("output")
        text = output if isinstance(output, str) else "" if output is None else json_text(output)
        call_id = optional(item, "call_id", "a string", path) or required(item, "id", "a string", path)
        return Message("tool", (ToolResult(call_id, (Text(text),) if text else (), item.get("status") == "failed"),))

    items: Mapping[str, Callable[..., Message]] = {
        "message": _message, "item_reference": _reference, "reasoning": _reasoning, "function_call": _call,
        "custom_tool_call": _custom_call, "function_call_output": _result, "custom_tool_call_output": _result,
        **dict.fromkeys(RESPONSES_OWN_CALLS, _own_call), **dict.fromkeys(RESPONSES_OWN_RESULTS, _own_result)}

    def _image_part(self, part: Dict[str, Any], path: str, notes: Notes) -> Optional[Image]:
        notes.images.append(path)
        detail = optional(part, "detail", "a string", path)
        url = optional(part, "image_url", "a string", path)
        if url is not None:
            return url_image(url, "high" if detail == "original" else detail, f"{path}.image_url")
        if optional(part, "file_id", "a string", path) is None:
            raise missing_field(f"{path}.image_url")
        notes.refused.append((f"{path}.file_id", "only image_url can go to this model, not file_id"))
        return None

    def _file_part(self, part: Dict[str, Any], path: str, notes: Notes) -> Optional[Document]:
        name, payload = optional(part, "filename", "a string", path), optional(part, "file_data", "a string", path)
        if payload is not None:
            return file_document(payload, name, f"{path}.file_data")
        url = optional(part, "file_url", "a string", path)
        if url is not None:
            return Document(url=check_url(url, f"{path}.file_url"), name=name)
        notes.refused.append((path, "only file_data and file_url can go to this model, not file_id"))
        return None

    content_parts: Mapping[str, Callable[..., Optional[Part]]] = {
        **dict.fromkeys(("input_text", "output_text", "text", "summary_text"), OpenAIClient.text_part),
        "refusal": OpenAIClient.refusal_part, "input_image": _image_part, "input_file": _file_part}

    def render(self, request: Request, reply: Reply, stamp: Stamp) -> Dict[str, Any]:
        """A response object."""
        shape = ResponseShape(request, stamp, reply.id)
        shown = [part for part in reply.parts if part != Text()]
        output = [shape.item(part, place) for place, part in enumerate(shown)]
        if is_explained(reply.stop_reason, reply.detail):
            output.append(shape.refusal(reply.detail, len(output)))
        return shape.ended(output, reply.stop_reason, reply.usage, reply.detail)

    def writer(self, request: Request, stamp: Stamp) -> Writer:
        """See `ClientProtocol.writer`."""
        return ResponsesWriter(request, stamp)

    def error_event(self, error: GatewayError, request_id: str) -> bytes:
        """A response.failed event where nothing is known of the response: see `ResponsesWriter` and `ResponsesLane`."""
        shape = ResponseShape(Request("", ()), Stamp(request_id[len("req_"):], 0))
        event = {"type": "response.failed", "sequence_number": 0, "response": shape.failed((), error)}
        return sse(event, "response.failed")


def spaced_name(space: str, name: str) -> str:
    """The one name of a tool inside a namespace, for providers that have no such thing."""
    return fit_id(f"{space}{'' if space.endswith('__') else '__'}{name}", RESPONSES_LIMIT)


def seal_thinking(part: Thinking) -> Optional[str]:
    """`encrypted_content` for thinking that another protocol's model has signed. It holds the text too: what its maker
    has signed must go back to it as it was, and clients may shorten a summary."""
    if not part.signature:
        return None
    packed = json_text([part.signature, part.text, part.redacted])
    return seal(replace(part, signature=packed), ResponsesClient.name)


def open_thinking(text: str, signature: Optional[str], maker: str, origin: str) -> Thinking:
    """What `seal_thinking` has packed; unsigned thinking when that is damaged."""
    try:
        inner, kept, redacted = json.loads(signature or "")
    except (ValueError, TypeError):
        return Thinking(text)
    if not isinstance(inner, str) or not isinstance(kept, str) or not isinstance(redacted, bool):
        return Thinking(text)
    return Thinking(kept, inner, redacted, maker, origin)


def responses_usage(usage: Usage) -> Dict[str, Any]:
    """Usage in the Responses API's terms: input_tokens includes cached tokens."""
    return {"input_tokens": usage.prompt,
            "input_tokens_details": {"cached_tokens": usage.cache_read, "cache_write_tokens": usage.cache_write},
            "output_tokens": usage.output, "output_tokens_details": {"reasoning_tokens": usage.reasoning},
            "total_tokens": usage.prompt + usage.output}


def response_failure(error: GatewayError) -> Dict[str, str]:
    """The `error` of a failed response. Codex reads the pause that a rate limit asks for from its text."""
    code = next((code for kind, code in RESPONSES_FAILURES if isinstance(error, kind)), "server_error")
    message = error.message
    if isinstance(error, RateLimited) and error.retry_after is not None and read_delay(message) is None:
        message += f" Please try again in {error.retry_after:g}s."
    return {"code": code, "message": message}


def is_explained(stop_reason: str, detail: Optional[str]) -> bool:
    """Whether a refusal has words of its own, which then are an item of the output."""
    return stop_reason == "refusal" and bool(detail)


def output_text(text: str) -> Dict[str, Any]:
    """The content of a message."""
    return {"type": "output_text", "text": text, "annotations": [], "logprobs": []}


class ResponseShape:
    """What whole and streamed answers have in common: ids, output items and the response object. `place` is an item's
    index in the output."""

    def __init__(self, request: Request, stamp: Stamp, provider_id: str = "") -> None:
        self._request = request
        self._stamp = stamp
        self.id = provider_id if provider_id.startswith("resp_") else "resp_" + stamp.id
        # a host that speaks Responses itself calls a tool by its name in the namespace
        self._tools = {**{tool.path[1]: tool for tool in request.tools if tool.path},
                       **{tool.name: tool for tool in request.tools}}

    def opening(self, part: Part, place: int) -> Dict[str, Any]:
        """An output item as it is announced, without its contents."""
        if isinstance(part, Thinking):
            return {"id": f"rs_{self._stamp.id}{place}", "type": "reasoning", "summary": []}
        if not isinstance(part, ToolCall):
            return {"id": f"msg_{self._stamp.id}{place}", "type": "message", "status": "in_progress",
                    "role": "assistant", "content": []}
        tool = self._tools.get(part.name, Tool(part.name))
        space, name = tool.path or (None, tool.name)
        names = {"call_id": fit_id(part.id, RESPONSES_LIMIT), **present(namespace=space), "name": name}
        kind, prefix, field_name = (("custom_tool_call", "ctc", "input") if tool.custom else
                                    ("function_call", "fc", "arguments"))
        return {"id": f"{prefix}_{self._stamp.id}{place}", "type": kind, "status": "in_progress", **names,
                field_name: ""}

    def item(self, part: Part, place: int) -> Dict[str, Any]:
        """A complete output item."""
        item = self.opening(part, place)
        if isinstance(part, Thinking):
            return {**item, **self._thoughts(part)}
        item["status"] = "completed"
        if isinstance(part, Text):
            item["content"] = [output_text(part.text)]
        elif isinstance(part, ToolCall):
            item.update({"input": custom_input(part)} if item["type"] == "custom_tool_call" else
                        {"arguments": part.arguments or "{}"})
        return item

    def _thoughts(self, part: Thinking) -> Dict[str, Any]:
        """The contents of a reasoning item. What a host of this protocol has sealed is in an item of its own."""
        own = as_dict(reasoning_item(part.signature)) if part.maker == ResponsesClient.name else {}
        sealed = own.get("encrypted_content") if own else seal_thinking(part)
        return {"summary": [{"type": "summary_text", "text": part.text}] if part.text else [],
                **present(content=own.get("content"), encrypted_content=sealed)}

    def refusal(self, text: Optional[str], place: int) -> Dict[str, Any]:
        """An item that says why there is no answer."""
        return {**self.opening(Text(), place), "status": "completed",
                "content": [{"type": "refusal", "refusal": text}]}

    def response(self, status: str, output: Sequence[Dict[str, Any]] = (), **fields: Any) -> Dict[str, Any]:
        """The response object, which repeats what was asked for, or OpenAI's default of it. When it ended nobody knows
        in this half of the file: it has no clock."""
        data = self._request.data
        asked = {name: default if data.get(name) is None else data[name] for name, default in self._ECHOED.items()}
        tier = asked["service_tier"]
        return {
            "id": self.id, "object": "response", "created_at": self._stamp.created, "status": status,
            "completed_at": self._stamp.created if status == "completed" else None, "error": None,
            "incomplete_details": None, "model": self._request.model, "output": list(output), **asked,
            "previous_response_id": None, "store": False, "background": False, "frequency_penalty": 0.0,
            "presence_penalty": 0.0, "service_tier": "default" if tier == "auto" else tier,
            "text": {"format": {"type": "text"}, **present(**asked["text"])},
            "reasoning": {"effort": None, "summary": None, **asked["reasoning"]},
            "tools": [self._echo(tool) for tool in asked["tools"]], "usage": None,
            **present(user=data.get("user")), **fields}

    _ECHOED: Dict[str, Any] = {
        "instructions": None, "max_output_tokens": None, "max_tool_calls": None, "metadata": {},
        "parallel_tool_calls": True, "prompt_cache_key": None, "reasoning": {}, "safety_identifier": None,
        "service_tier": "default", "temperature": 1.0, "text": {}, "tool_choice": "auto", "tools": (),
        "top_logprobs": 0, "top_p": 1.0, "truncation": "disabled"}

    def _echo(self, tool: Dict[str, Any]) -> Dict[str, Any]:
        """A tool with all fields that a response has of it."""
        if tool.get("type", "function") != "function":
            return tool
        return {"type": "function", "description": None, "parameters": None, "strict": None, **tool}

    def ended(self, output: Sequence[Dict[str, Any]], stop_reason: str, usage: Usage, detail: Optional[str],
              ) -> Dict[str, Any]:
        """The response object at the regular end."""
        status, reason = RESPONSES_END["stop" if is_explained(stop_reason, detail) else stop_reason]
        return self.response(status, output, usage=responses_usage(usage),
                             incomplete_details={"reason": reason} if reason else None)

    def failed(self, output: Sequence[Dict[str, Any]], error: GatewayError) -> Dict[str, Any]:
        """The response object of an answer that broke."""
        return self.response("failed", output, error=response_failure(error))


class ResponsesWriter(SerialWriter):
    """Events → response.* events. An item keeps its id from its announcement to the last event; a custom tool's input
    is sent at its end, since the JSON that it travels in is not what the client wants."""

    # item type → (stem of its events, its index in the item, what else a delta holds)
    _STEMS = {"message": ("response.output_text", {"content_index": 0}, ',"logprobs":[]'),
              "reasoning": ("response.reasoning_summary_text", {"summary_index": 0}, ""),
              "function_call": ("response.function_call_arguments", {}, ""),
              "custom_tool_call": ("response.custom_tool_call_input", {}, "")}

    def __init__(self, request: Request, stamp: Stamp) -> None:
        super().__init__(request, stamp)
        self._shape = ResponseShape(request, stamp)
        self._output: List[Dict[str, Any]] = []
        self._number = 0                        # of the next event
        self._is_created = self._has_piece = False
        self._kind = ""
        self._at: Dict[str, Any] = {}
        self._head = self._tail = ""

    def _event(self, kind: str, **fields: Any) -> bytes:
        self._number += 1
        return sse({"type": kind, **fields, "sequence_number": self._number - 1}, kind)

    def _start(self, event: Start) -> bytes:
        self._is_created = True
        self._shape = ResponseShape(self._request, self._stamp, event.id)
        response = self._shape.response("in_progress")
        return (self._event("response.created", response=response)
                + self._event("response.in_progress", response=response))

    def begin(self, part: Part) -> bytes:
        """See `SerialWriter.begin`."""
        return self._announce(self._shape.opening(part, len(self._output)))

    def _announce(self, item: Dict[str, Any]) -> bytes:
        self._kind, self._has_piece = item["type"], False
        stem, index, rest = self._STEMS[self._kind]
        self._at = {"item_id": item["id"], "output_index": len(self._output), **index}
        opened = {"type": stem + ".delta", **self._at, "delta": ""}
        self._head = f"event: {stem}.delta\ndata: " + dumps(opened)[:-len('""}')]
        self._tail = rest + ',"sequence_number":%d}\n\n'
        return self._event("response.output_item.added", output_index=len(self._output), item=item)

    def piece(self, text: str) -> bytes:
        """See `SerialWriter.piece`."""
        if self._kind == "custom_tool_call":
            return b""
        return (b"" if self._has_piece else self._first_piece()) + self._delta(text)

    def _delta(self, text: str) -> bytes:
        self._number += 1
        return (self._head + dumps(text) + self._tail % (self._number - 1)).encode("ascii")

    def _first_piece(self) -> bytes:
        self._has_piece = True
        if self._kind == "message":
            return self._event("response.content_part.added", **self._at, part=output_text(""))
        if self._kind == "reasoning":
            return self._event("response.reasoning_summary_part.added", **self._at,
                               part={"type": "summary_text", "text": ""})
        return b""

    def finish(self, part: Part) -> bytes:
        """See `SerialWriter.finish`."""
        item = self._shape.item(part, len(self._output))
        return self._closers[self._kind](self, item) + self._close(item)

    def _close(self, item: Dict[str, Any]) -> bytes:
        self._output.append(item)
        return self._event("response.output_item.done", output_index=len(self._output) - 1, item=item)

    def _close_text(self, item: Dict[str, Any]) -> bytes:
        part, = item["content"]
        return (self._event("response.output_text.done", **self._at, text=part["text"], logprobs=[])
                + self._event("response.content_part.done", **self._at, part=part))

    def _close_reasoning(self, item: Dict[str, Any]) -> bytes:
        if not item["summary"]:
            return b""
        part, = item["summary"]
        opening = b"" if self._has_piece else self.piece(part["text"])
        return (opening + self._event("response.reasoning_summary_text.done", **self._at, text=part["text"])
                + self._event("response.reasoning_summary_part.done", **self._at, part=part))

    def _close_call(self, item: Dict[str, Any]) -> bytes:
        # clients parse the joined fragments, and "" is not JSON
        opening = b"" if self._has_piece else self._delta(item["arguments"])
        return opening + self._event("response.function_call_arguments.done", **self._at, name=item["name"],
                                     arguments=item["arguments"])

    def _close_custom(self, item: Dict[str, Any]) -> bytes:
        opening = self._delta(item["input"]) if item["input"] else b""
        return opening + self._event("response.custom_tool_call_input.done", **self._at, input=item["input"])

    _closers: Mapping[str, Callable[[Any, Dict[str, Any]], bytes]] = {
        "message": _close_text, "reasoning": _close_reasoning, "function_call": _close_call,
        "custom_tool_call": _close_custom}

    def _refuse(self, text: str) -> bytes:
        item = self._shape.refusal(text, len(self._output))
        part, = item["content"]
        return b"".join((
            self._announce({**item, "status": "in_progress", "content": []}),
            self._event("response.content_part.added", **self._at, part={**part, "refusal": ""}),
            self._event("response.refusal.delta", **self._at, delta=text),
            self._event("response.refusal.done", **self._at, refusal=text),
            self._event("response.content_part.done", **self._at, part=part), self._close(item)))

    def _done(self, event: Done) -> bytes:
        refusal = self._refuse(event.detail or "") if is_explained(event.stop_reason, event.detail) else b""
        response = self._shape.ended(self._output, event.stop_reason, event.usage, event.detail)
        return refusal + self._event(f"response.{response['status']}", response=response)

    def _failed(self, event: Failed) -> bytes:
        opening = b"" if self._is_created else self._start(Start())
        return opening + self._event("response.failed", response=self._shape.failed(self._output, event.error))

    handlers = {Start: _start, PartStart: SerialWriter.part_start, PartDelta: SerialWriter.part_delta,
                PartEnd: SerialWriter.part_end, Done: _done, Failed: _failed}


CHAT = OpenAIChat()
TEXTS = OpenAITexts()
EMBEDDINGS = OpenAIEmbeddings()
MESSAGES = AnthropicClient()
RESPONSES = ResponsesClient()
CLIENT_PROTOCOLS: Dict[str, ClientProtocol] = {
    client.name: client for client in (CHAT, MESSAGES, RESPONSES, TEXTS, EMBEDDINGS)}


# ======================================================================================================================
# §8 Upstream protocols
# ======================================================================================================================
#
# What providers speak. An upstream protocol never learns who asked.


class Reader:
    """One provider answer: bytes in, events out. `feed` and `end` for a stream, `whole` for a JSON answer. They are
    iterators, so that what came before a fault is not lost with it."""

    def __init__(self) -> None:
        self._splitter = EventSplitter()
        self._parts = Assembler()

    def feed(self, data: bytes) -> Iterator[Event]:
        """The events that `data` completes."""
        return self._read(self._splitter.feed(data))

    def end(self) -> Iterator[Event]:
        """The events at the regular end of the stream."""
        yield from self._read(self._splitter.end())
        yield from self.finish()

    def _read(self, block: bytes) -> Iterator[Event]:
        for name, text in parse_events(block):
            yield from self.on_event(name, text)

    def on_event(self, name: str, text: str) -> Iterator[Event]:
        """The events that one server-sent event amounts to."""
        raise NotImplementedError

    def finish(self) -> Iterator[Event]:
        """What is due when the stream is over; raises `UpstreamProtocolError` when its terminal event is missing."""
        raise NotImplementedError

    def whole(self, body: Dict[str, Any]) -> Iterator[Event]:
        """The events that a whole JSON answer amounts to."""
        raise NotImplementedError


class Assembler:
    """Numbers an answer's parts in the order they begin and keeps their text until they end. `key` is whatever the
    provider tells them apart by."""

    def __init__(self) -> None:
        self._open: Dict[Any, Tuple[int, Part, List[str]]] = {}
        self._count = self._size = 0

    def __contains__(self, key: Any) -> bool:
        return key in self._open

    def start(self, key: Any, part: Part) -> PartStart:
        """Begins a part."""
        self._open[key] = (self._count, part, [])
        self._count += 1
        return PartStart(self._count - 1, part)

    def delta(self, key: Any, text: str) -> PartDelta:
        """Adds to a part."""
        index, _, pieces = self._open[key]
        self._size += len(text)
        if self._size > MAX_EVENT_BYTES:
            raise UpstreamProtocolError(f"the provider's answer is longer than {MAX_EVENT_BYTES} bytes")
        pieces.append(text)
        return PartDelta(index, text)

    def end(self, key: Any, signature: Optional[str] = None) -> PartEnd:
        """Ends a part."""
        index, part, pieces = self._open.pop(key)
        text = clean_text("".join(pieces))
        if isinstance(part, ToolCall):
            return PartEnd(index, replace(part, arguments=text))
        if isinstance(part, Thinking):
            return PartEnd(index, part if part.redacted else replace(part, text=text, signature=signature))
        return PartEnd(index, Text(text))

    def end_all(self) -> List[PartEnd]:
        """Ends all open parts, in the order they began."""
        return [self.end(key) for key in list(self._open)]


class Mender:
    """Joins surrogate pairs whose halves come in two pieces of a text, and leaves out halves that stay alone. `key` tells
    texts that grow side by side apart."""

    def __init__(self) -> None:
        self._halves: Dict[Any, str] = {}

    def mend(self, key: Any, text: str) -> str:
        """The piece as it can be written; the very same string when there is nothing to mend."""
        if not self._halves and (text.isascii() or not _SURROGATE.search(text)):
            return text
        text = self._halves.pop(key, "") + text
        if "\ud800" <= text[-1:] <= "\udbff":
            self._halves[key], text = text[-1], text[:-1]
        return clean_text(text)


def is_empty(stop_reason: str, usage: Usage, has_content: bool) -> bool:
    """Whether an answer that claims success holds nothing. A model may have nothing to add, and that counts tokens; an
    answer without any is a fault of the host's."""
    return not has_content and not usage.output and stop_reason in ("stop", "end_turn", "")


# What code that walks JSON of the wrong shape raises.
MALFORMED = (KeyError, TypeError, ValueError, AttributeError, IndexError, OverflowError, RecursionError)


class Settled:
    """Keeps a reader's promises for it: exactly one `Done` or `Failed`, last; nothing malformed gets through; a stop with
    tool calls is a tool_use; text has no halves of surrogate pairs, even when a pair is split between two events."""

    def __init__(self, reader: Reader) -> None:
        self._reader = reader
        self._has_call = self._has_part = False
        self._mender = Mender()
        self.finished = False

    def feed(self, data: bytes) -> List[Event]:
        """See `Reader.feed`."""
        return self._settle(lambda: self._reader.feed(data))

    def end(self) -> List[Event]:
        """See `Reader.end`."""
        return self._last(self._settle(self._reader.end))

    def whole(self, body: Dict[str, Any]) -> List[Event]:
        """See `Reader.whole`."""
        return self._last(self._settle(lambda: self._reader.whole(body)))

    def _last(self, events: List[Event]) -> List[Event]:
        return events + self.fail(UpstreamProtocolError("the provider's answer ended early"))

    def fail(self, error: GatewayError) -> List[Event]:
        """The connection broke; of no account when the terminal event has been seen."""
        return [] if self.finished else self._finish(Failed(error))

    def _finish(self, event: Event) -> List[Event]:
        self.finished = True
        return [event]

    def _settle(self, read: Callable[[], Iterable[Event]]) -> List[Event]:
        out: List[Event] = []
        if self.finished:
            return out
        try:
            for event in read():
                kind = type(event)
                if kind is PartDelta:
                    text = self._mender.mend(event.index, event.text)
                    if text:
                        out.append(event if text is event.text else PartDelta(event.index, text))
                    continue
                if kind is PartStart:
                    self._has_part = True
                    self._has_call = self._has_call or isinstance(event.part, ToolCall)
                elif kind is Done:
                    if is_empty(event.stop_reason, event.usage, self._has_part):
                        raise EmptyAnswer("the provider's answer is empty")
                    if event.stop_reason == "stop" and self._has_call:
                        event = event._replace(stop_reason="tool_use")
                    return out + self._finish(event)
                out.append(event)
        except GatewayError as error:
            return out + self._finish(Failed(error))
        except MALFORMED as error:
            log.debug("malformed provider answer", exc_info=True)
            reason = f"the provider's answer is malformed ({type(error).__name__})"
            return out + self._finish(Failed(UpstreamProtocolError(reason)))
        return out


# Ends at which the last call may lack arguments that it was to have.
CUTTING_STOPS = frozenset({"length", "overflow", "refusal"})


class SoundCalls:
    """Lets a tool call through only when its arguments are an object, for clients whose protocol has no place for
    anything else. A call is held until it ends, and whatever began after it as well, so that the order stays. Then
    arguments with unambiguous damage are mended; with any other the call becomes text that shows what the model wrote,
    and the answer stops for tool use only if another call is left."""

    def __init__(self) -> None:
        self._held: Dict[int, List[Event]] = {}     # by part, in the order they began; the first one is a call
        self._has_call = False
        self._stop: Optional[str] = None

    def feed(self, events: Iterable[Event]) -> List[Event]:
        """The events for the client that these amount to."""
        return [due for event in events for due in self._take(event)]

    def _take(self, event: Event) -> List[Event]:
        if isinstance(event, Done):
            return self._done(event)
        if isinstance(event, (Start, Failed)):
            return [event]
        if isinstance(event, PartStart) and (self._held or isinstance(event.part, ToolCall)):
            self._held[event.index] = []
        if event.index not in self._held:
            return [event]
        self._held[event.index].append(event)
        return [] if isinstance(event, PartDelta) else self._release()

    def _release(self) -> List[Event]:
        out: List[Event] = []
        while self._held:
            index, events = next(iter(self._held.items()))
            first, last = events[0], events[-1]
            if isinstance(first, PartStart) and isinstance(first.part, ToolCall):
                if not isinstance(last, PartEnd) or not self._is_settled(last.part):
                    break
                events = self._events(last)
            out.extend(events)
            del self._held[index]
        return out

    def _is_settled(self, call: Any) -> bool:
        """Whether it is clear that the call is complete, or not: one without arguments may have been cut before them,
        unless the model went on to something else."""
        return bool(call.arguments.strip()) or len(self._held) > 1 or self._stop is not None

    def _events(self, event: PartEnd) -> List[Event]:
        """A complete call's events, or those of the text in its place."""
        index, call = event
        assert isinstance(call, ToolCall)
        is_cut = not call.arguments.strip() and len(self._held) == 1 and self._stop in CUTTING_STOPS
        arguments = None if is_cut else sound_arguments(call.arguments)
        if arguments is None:
            text = f"[call of {call.name} with malformed arguments] {call.arguments}"
            if is_cut:
                text = f"[call of {call.name}, cut off before its arguments]"
            return [PartStart(index, Text()), PartDelta(index, text), PartEnd(index, Text(text))]
        self._has_call = True
        return [PartStart(index, replace(call, arguments="")), PartDelta(index, arguments),
                PartEnd(index, replace(call, arguments=arguments))]

    def _done(self, event: Done) -> List[Event]:
        self._stop = event.stop_reason
        out = self._release()
        if event.stop_reason == "tool_use" and not self._has_call:
            event = event._replace(stop_reason="stop")
        return [*out, event]


def sound_arguments(text: str) -> Optional[str]:
    """A call's arguments as the JSON text of an object: as the model wrote them where they are one, mended where the
    damage is unambiguous, else None."""
    try:
        if isinstance(loads(text), dict):
            return text
    except (ValueError, RecursionError):
        pass
    mended = repair_json_object(text)
    return None if mended is None else json_text(mended)


class UpstreamProtocol:
    """A dialect that providers speak: requests to calls, answers to events."""

    name = ""
    forwards: FrozenSet[str] = frozenset()  # fields of `Request.extra` that the builder knows all the same
    stream_type = "text/event-stream"       # content type by which a streamed answer is told from a whole one
    is_lax = False                          # spoken by servers that do not see to it that tool arguments are sound

    def carries(self, model: Model) -> FrozenSet[str]:
        """Which of `OPTIONAL_FIELDS` a request to this model can hold; "json_object" for free-form JSON mode."""
        raise NotImplementedError

    def replays(self, part: Thinking, model: Model) -> bool:
        """Whether earlier thinking goes back to this model."""
        raise NotImplementedError

    def fit(self, request: Request, model: Model) -> Tuple[Request, List[str]]:
        """Settles what cannot stand together in one request; the names of our fields that had to go."""
        return request, []

    def marks_cache(self, model: Model) -> bool:
        """Whether requests to this model carry marks for its prompt cache, so that the client's are not lost."""
        return False

    def needs_bytes(self, part: Union[Image, Document], model: Model) -> bool:
        """Whether this host takes no address in place of the bytes."""
        return False

    def tool_names(self, request: Request, credential: Credential) -> Mapping[str, str]:
        """As sent → the client's own, of the tools that this credential demands under another name."""
        return {}

    def build(self, request: Request, model: Model, credential: Credential) -> Call:
        """The call for a normalised request."""
        raise NotImplementedError

    def sign(self, call: Call, credential: Credential, now: float) -> Call:
        """The call with what depends on the moment of sending."""
        return call

    def reader(self, model: Model, stamp: Stamp) -> Reader:
        """A fresh reader for one answer."""
        raise NotImplementedError

    def parse_error(self, status: int, headers: Mapping[str, str], body: bytes, now: float) -> GatewayError:
        """The error that an answer with status 400 or above means."""
        message, kind, code = error_fields(body)
        return upstream_error(status, message or f"the provider answered {status} without a message", kind, code,
                              parse_retry_after(headers, now))


# --- Provider errors --------------------------------------------------------------------------------------------------

ERROR_BY_STATUS: Dict[int, Type[GatewayError]] = {
    400: BadRequest, 401: CredentialRefused, 402: QuotaExceeded, 403: Forbidden, 404: ModelNotFound,
    405: UpstreamError, 408: UpstreamTimeout, 409: Conflict, 413: BodyTooLarge, 422: BadRequest, 429: RateLimited,
    501: NotSupported, 503: Overloaded, 504: UpstreamTimeout, 529: Overloaded}
# Our codes for a provider's refusals, where they differ from our own refusals of the same kind.
PROVIDER_CODES: Dict[Type[GatewayError], str] = {Forbidden: "upstream_forbidden", BodyTooLarge: "request_too_large"}
# Errors inside a stream come without a status of their own.
STATUS_BY_KIND = {
    "invalid_request_error": 400, "authentication_error": 401, "billing_error": 402, "permission_error": 403,
    "not_found_error": 404, "request_too_large": 413, "rate_limit_error": 429, "rate_limit_exceeded": 429,
    "insufficient_quota": 402, "overloaded_error": 529, "server_is_overloaded": 503, "service_unavailable_error": 503,
    "timeout_error": 504}
_OVERFLOW = re.compile("|".join((
    r"prompt (?:is )?too long", r"prompt exceeds max length", r"exceeded (?:max )?context length",
    r"input is too long for requested model", r"exceeds the context window", r"context[_ ]length[_ ]exceeded",
    r"maximum context length", r"context window exceed", r"input token count.*exceeds the maximum",
    r"maximum prompt length is \d+", r"reduce the length of the messages", r"maximum allowed input length",
    r"longer than the model's context length", r"exceeds the limit of \d+", r"exceeds the available context size",
    r"greater than the context length", r"exceeded model token limit", r"too large for model with \d+",
    r"but the configured context size is", r"model_context_window_exceeded", r"range of input length should be",
    r"too many tokens", r"token limit exceeded")), re.IGNORECASE)
_RATE_WORDS = re.compile(r"rate limit|too many requests|throttl", re.IGNORECASE)
_QUOTA_WORDS = re.compile(r"usage ?limit|insufficient_quota|exceeded your current quota|available balance|out of budget|"
                          r"quota exceeded|billing|credit balance", re.IGNORECASE)


def upstream_error(status: int, message: str, kind: str = "", code: str = "", retry_after: Optional[float] = None,
                   ) -> GatewayError:
    """The error that a provider's status, message, type and code amount to."""
    text = f"{message} {kind} {code}"
    if status in (400, 413, 422, 500) and _OVERFLOW.search(text) and not _RATE_WORDS.search(text):
        return ContextOverflow(message)
    if status == 429 and _QUOTA_WORDS.search(text):
        return QuotaExceeded(message, retry_after=retry_after)
    error_class = ERROR_BY_STATUS.get(status, BadRequest if 400 <= status < 500 else UpstreamError)
    code = (code or "invalid_request") if error_class is BadRequest else PROVIDER_CODES.get(error_class, "")
    return error_class(message, code=code or None, retry_after=retry_after)


def stream_error(body: Mapping[str, Any]) -> GatewayError:
    """The error that an object with an `error` field inside an answer of status 200 means."""
    message, kind, code = error_fields(dumps(body).encode("ascii"))
    status = int(code) if code.isdigit() and 400 <= int(code) < 600 else STATUS_BY_KIND.get(kind, 0)
    return upstream_error(status or STATUS_BY_KIND.get(code, 500), message or "the provider reported an error", kind, code)


def error_fields(body: bytes) -> Tuple[str, str, str]:
    """(message, type, code) of a provider's error body, whatever its shape; "" for what it does not say."""
    text = body.decode("utf-8", "replace").strip()
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return ("" if text.startswith("<") else text[:MAX_MESSAGE_CHARS]), "", ""
    if isinstance(value, list) and value:
        value = value[0]
    if not isinstance(value, dict):
        return text[:MAX_MESSAGE_CHARS], "", ""
    inner = value.get("error", value)
    if not isinstance(inner, dict):
        inner = {**value, "message": inner}
    message = inner.get("message") or inner.get("detail") or value.get("detail") or value.get("message") or ""
    raw = (inner.get("metadata") or {}).get("raw") if isinstance(inner.get("metadata"), dict) else None
    if raw:                                     # OpenRouter: what the host behind it said
        message = f"{message}: {raw}"
    if not isinstance(message, str):
        message = json_text(message)
    kind, code = inner.get("type"), inner.get("code")
    return (message[:MAX_MESSAGE_CHARS], kind if isinstance(kind, str) else "",
            str(code) if isinstance(code, (str, int)) and not isinstance(code, bool) else "")


def token_count(value: Any) -> int:
    """A token count as an int; 0 for anything else."""
    return int(value) if isinstance(value, (int, float)) and not isinstance(value, bool) and value > 0 else 0


def as_list(value: Any) -> List[Any]:
    """The value if it is an array, otherwise an empty one."""
    return value if isinstance(value, list) else []


def as_dict(value: Any) -> Dict[str, Any]:
    """`value` if it is a dict, else an empty one."""
    return value if isinstance(value, dict) else {}


def authorization(model: Model, credential: Credential, scheme: str = "bearer") -> Dict[str, str]:
    """Request headers that all providers share: identity, authorisation, then what the user configured."""
    headers = {"content-type": "application/json", "accept": "application/json, text/event-stream",
               "user-agent": USER_AGENT}
    if credential.token and credential.kind != "client":
        if scheme == "bearer":
            headers["authorization"] = f"Bearer {credential.token}"
        elif scheme == "cf-aig-authorization":
            headers[scheme] = f"Bearer {credential.token}"
        else:
            headers[scheme] = credential.token
    headers.update({name.lower(): value for name, value in {**credential.headers, **model.headers}.items()})
    return headers


def join_url(base: str, path: str) -> str:
    """`base` and `path` with one slash between, whether or not the base ends in a version that the path begins with."""
    base = base.rstrip("/")
    if path.startswith("/v1/") and base.endswith("/v1"):
        base = base[:-3]
    return base + path


# --- openai-completions -----------------------------------------------------------------------------------------------

CHAT_STOP = {"stop": "stop", "end": "stop", "eos": "stop", "length": "length", "max_tokens": "length",
             "tool_calls": "tool_use", "function_call": "tool_use", "content_filter": "refusal",
             "model_context_window_exceeded": "overflow"}
CHAT_FAILURES = frozenset({"error", "network_error", "insufficient_system_resource", "server_error"})
# delta fields that hold reasoning; hosts that send two of them send the same text twice
REASONING_FIELDS = ("reasoning_content", "reasoning", "reasoning_text")
IMAGE_NOTE = "(the image is in the next message)"
EMPTY_RESULT = "(no output)"


class OpenAICompletions(UpstreamProtocol):
    """OpenAI Chat Completions and the many servers that speak it: POST {base}/chat/completions.

    Compat flags are those of pi's models.json; an absent flag has the value of OpenAI's own API."""

    name = "openai-completions"
    is_lax = True

    def marks_cache(self, model: Model) -> bool:
        """See `UpstreamProtocol.marks_cache`."""
        return bool(model.flag("cacheControlFormat") == "anthropic")

    def carries(self, model: Model) -> FrozenSet[str]:
        """Everything but top_k, which most servers do not know, and reasoning on a model that is not known to reason."""
        fields = {"temperature", "top_p", "stop", "seed", "frequency_penalty", "presence_penalty", "logit_bias",
                  "parallel_tools", "output", "json_object", "user", "verbosity"}
        if model.reasoning:
            fields.add("reasoning")
        if not model.flag("supportsTemperature", True):
            fields -= {"temperature", "top_p"}
        return frozenset(fields)

    def replays(self, part: Thinking, model: Model) -> bool:
        """Its own sealed reasoning, and plain reasoning where the server insists on having it back."""
        return bool(sealed_details(part)) if part.signature else bool(
            not part.redacted and (model.flag("requiresReasoningContentOnAssistantMessages")
                                   or model.flag("requiresThinkingAsText")))

    def build(self, request: Request, model: Model, credential: Credential) -> Call:
        """See `UpstreamProtocol.build`."""
        messages = [chat_system(text.text for text in request.system)] if request.system else []
        for message in request.messages:
            messages.extend(self._message(message, model))
        body = present(
            model=model.id, messages=messages, stream=request.stream or None, max_tokens=request.max_tokens,
            temperature=request.temperature, top_p=request.top_p, stop=list(request.stop) or None, seed=request.seed,
            frequency_penalty=request.frequency_penalty, presence_penalty=request.presence_penalty,
            logit_bias=request.logit_bias, user=fit_length(request.user or "") or None, verbosity=request.verbosity,
            response_format=self._response_format(request.output),
            tools=[self._tool(tool, model) for tool in request.tools] or None)
        if request.tools:
            body.update(present(tool_choice=self._tool_choice(request.tool_choice),
                                parallel_tool_calls=request.parallel_tools))
        return self.post(self.adapt(body, request.reasoning, model)[0], request, model, credential)

    def post(self, body: Dict[str, Any], request: Request, model: Model, credential: Credential) -> Call:
        """The call that sends a finished body."""
        return self.relay("/chat/completions", body, request, model, credential)

    def relay(self, path: str, body: Dict[str, Any], request: Request, model: Model, credential: Credential) -> Call:
        """The call that sends a finished body to some path of the OpenAI API."""
        headers = {**session_headers(request, model),
                   **authorization(model, credential, model.flag("auth", "bearer"))}
        return Call("POST", join_url(model.base_url, path), headers, dumps(body).encode("ascii"))

    def _message(self, message: Message, model: Model) -> List[Dict[str, Any]]:
        if message.role == "tool":
            return self._results(message)
        if message.role == "assistant":
            return self._assistant(message, model)
        if message.role == "system":
            return [chat_system(part.text for part in message.parts if isinstance(part, Text))]
        if all(isinstance(part, Text) for part in message.parts):
            return [{"role": "user", "content": "\n".join(part.text for part in message.parts)}]
        return [{"role": "user", "content": [self._part(part) for part in message.parts]}]

    def needs_bytes(self, part: Union[Image, Document], model: Model) -> bool:
        """See `UpstreamProtocol.needs_bytes`; files have no address here."""
        return isinstance(part, Document)

    def _part(self, part: Part) -> Dict[str, Any]:
        if isinstance(part, Image):
            return {"type": "image_url", "image_url": present(url=part.url or data_url(part), detail=part.detail)}
        if isinstance(part, Document):
            if part.data is None:
                raise BadRequest("a document by URL cannot go to this model; send its bytes",
                                 code="unsupported_parameter", param="messages")
            return {"type": "file", "file": {"filename": part.name or "document.pdf", "file_data": data_url(part)}}
        return {"type": "text", "text": part.text if isinstance(part, Text) else ""}

    def _assistant(self, message: Message, model: Model) -> List[Dict[str, Any]]:
        text = "".join(part.text for part in message.parts if isinstance(part, Text))
        thinking = [part for part in message.parts if isinstance(part, Thinking)]
        calls = [{"id": chat_call_id(part.id), "type": "function",
                  "function": {"name": part.name, "arguments": part.arguments or "{}"}}
                 for part in message.parts if isinstance(part, ToolCall)]
        details = [item for part in thinking for item in sealed_details(part)]
        plain = "\n".join(part.text for part in thinking if not part.signature)
        if model.flag("requiresThinkingAsText") and plain:
            text = plain + ("\n\n" + text if text else "")
        out = {"role": "assistant", "content": text or (None if calls else "")}
        out.update(present(
            tool_calls=calls or None, reasoning_details=details or None,
            reasoning_content=plain if plain and model.flag("requiresReasoningContentOnAssistantMessages") else None))
        return [out] if text or calls or details else []

    def _results(self, message: Message) -> List[Dict[str, Any]]:
        """Tool messages, and behind all of them one user message with their images, which a tool message cannot hold."""
        out, images = [], []
        for result in message.parts:
            if not isinstance(result, ToolResult):
                continue
            text = "\n".join(part.text for part in result.parts if isinstance(part, Text))
            shown = [part for part in result.parts if isinstance(part, (Image, Document))]
            if result.is_error and not text.lower().startswith("error"):
                text = f"Error: {text}"
            out.append({"role": "tool", "tool_call_id": chat_call_id(result.call_id),
                        "content": text or (IMAGE_NOTE if shown else EMPTY_RESULT)})
            images.extend(shown)
        if images:
            parts: List[Part] = [Text("Images from the tool results above:"), *images]
            out.append({"role": "user", "content": [self._part(part) for part in parts]})
        return out

    def _tool(self, tool: Tool, model: Model) -> Dict[str, Any]:
        strict = tool.strict if model.flag("supportsStrictMode", True) else None
        return {"type": "function", "function": present(name=tool.name, description=tool.description,
                                                        parameters=tool.schema, strict=strict)}

    def _tool_choice(self, choice: Optional[ToolChoice]) -> Any:
        if choice is None or choice.kind != "tool":
            return choice and choice.kind
        return {"type": "function", "function": {"name": choice.name}}

    def _response_format(self, output: Optional[OutputFormat]) -> Optional[Dict[str, Any]]:
        if output is None or output.schema is None:
            return output and {"type": "json_object"}
        return {"type": "json_schema", "json_schema": present(name=output.name, schema=output.schema,
                                                              strict=output.strict)}

    def adapt(self, body: Dict[str, Any], reasoning: Optional[Reasoning], model: Model,
              ) -> Tuple[Dict[str, Any], List[str]]:
        """`body` as this host wants it, by the model's compat flags, and the names of fields that had to go."""
        dropped = []
        body = {**body, "messages": adapt_messages(body["messages"], model)}
        adapt_limit(body, model)
        adapt_stream(body, model)
        adapt_tools(body, model)
        if not model.flag("supportsStore", True) and body.pop("store", None):
            dropped.append("store")
        if reasoning:
            fields = thinking_fields(reasoning, model)
            if not fields and reasoning.level != "off":
                dropped.append("reasoning_effort")
            body.update(fields)
        if self.marks_cache(model):
            mark_cache(body)
        body.update(present(provider=model.flag("openRouterRouting"), priority=model.flag("vllmPriority")))
        if model.flag("vercelGatewayRouting"):
            body["providerOptions"] = {"gateway": model.flag("vercelGatewayRouting")}
        body.update(model.sampling)
        return body, dropped

    def reader(self, model: Model, stamp: Stamp) -> Reader:
        """See `UpstreamProtocol.reader`."""
        return ChatReader(model, stamp)


def detail_seals(detail: Any) -> List[str]:
    """The opaque strings in an item of `reasoning_details`."""
    values = (as_dict(detail).get(name) for name in ("signature", "data"))
    return [value for value in values if isinstance(value, str) and value]


def sealed_details(part: Thinking) -> List[Any]:
    """The `reasoning_details` that a host of this dialect gave with the thinking; none for what others sealed."""
    try:
        details = json.loads(part.signature) if part.signature and part.maker == OpenAICompletions.name else None
    except (ValueError, RecursionError):
        details = None
    return details if isinstance(details, list) else []


def chat_call_id(call_id: str) -> str:
    """A tool call's id as hosts of this dialect take it: OpenAI allows 40 characters, others take what they gave."""
    return fit_id(call_id, 40) if len(call_id) > 40 or "|" in call_id else call_id


def chat_system(texts: Iterable[str]) -> Dict[str, Any]:
    """A system message; sections are set apart by a blank line."""
    return {"role": "system", "content": "\n\n".join(texts)}


def data_url(part: Union[Image, Document]) -> str:
    """The part's bytes as a data URL."""
    return f"data:{part.media_type};base64,{part.data}"


def session_headers(request: Request, model: Model) -> Dict[str, str]:
    """Headers that keep one conversation on one machine of the host, when the client names its session."""
    if not request.session or not model.flag("sendSessionAffinityHeaders"):
        return {}
    names = SESSION_HEADERS[model.flag("sessionAffinityFormat", "openai")]
    return {name: re.sub(r"[^\x21-\x7e]", "", request.session)[:64] for name in names}


SESSION_HEADERS = {"openai": ("session_id", "x-client-request-id", "x-session-affinity"),
                   "openai-nosession": ("x-client-request-id", "x-session-affinity"), "openrouter": ("x-session-id",)}


def adapt_limit(body: Dict[str, Any], model: Model) -> None:
    """The output limit under the one name that the host knows, within what the model can."""
    old, new = body.pop("max_tokens", None), body.pop("max_completion_tokens", None)
    limit = fit_max_tokens(old if new is None else new, model)
    body.update(present(**{model.flag("maxTokensField", "max_completion_tokens"): limit}))


def adapt_stream(body: Dict[str, Any], model: Model) -> None:
    """Usage is always asked for, for the log; the client sees it only if it asked itself."""
    options = body.pop("stream_options", None) or {}
    if body.get("stream") and model.flag("supportsUsageInStreaming", True):
        body["stream_options"] = {**options, "include_usage": True}


def adapt_tools(body: Dict[str, Any], model: Model) -> None:
    """No empty arrays and no choice without tools, which OpenAI answers with 400."""
    for name in ("tools", "functions"):
        if body.get(name) == []:
            del body[name]
    if body.get("tools"):
        body.update(present(tool_stream=True if model.flag("zaiToolStream") else None))
        return
    body.pop("tool_choice", None)
    if model.flag("requiresToolsWithToolHistory") and any(m.get("role") == "tool" for m in body["messages"]):
        body["tools"] = []


def adapt_messages(messages: Sequence[Dict[str, Any]], model: Model) -> List[Dict[str, Any]]:
    """Chat messages as the host wants them, by its compat flags."""
    names = {}
    out: List[Dict[str, Any]] = []
    for message in messages:
        message, role = dict(message), message.get("role")
        if role == "developer" and not model.flag("supportsDeveloperRole", True):
            message["role"] = "system"
        if role == "assistant":
            names.update((call.get("id"), as_dict(call.get("function")).get("name"))
                         for call in message.get("tool_calls") or ())
            if message.get("content") is None and (model.flag("requiresNonNullAssistantContent")
                                                   or model.flag("requiresAssistantAfterToolResult")):
                message["content"] = ""
            if model.reasoning and model.flag("requiresReasoningContentOnAssistantMessages"):
                message.setdefault("reasoning_content", "")
        elif role == "tool" and model.flag("requiresToolResultName"):
            message.setdefault("name", names.get(message.get("tool_call_id")) or "unknown")
        elif (role == "user" and out and out[-1].get("role") == "tool"
              and model.flag("requiresAssistantAfterToolResult")):
            out.append({"role": "assistant", "content": "I have processed the tool results."})
        out.append(message)
    return out


def mark_cache(body: Dict[str, Any]) -> None:
    """Cache marks in Anthropic's convention for hosts that pass them on: first system message, last tool, last message
    with text; nothing when the client set marks of its own."""
    if '"cache_control"' in dumps(body):
        return
    mark = {"cache_control": {"type": "ephemeral"}}
    messages = body["messages"]
    first = next((place for place, m in enumerate(messages) if m.get("role") in ("system", "developer")), None)
    last = next((place for place in reversed(range(len(messages))) if messages[place].get("content")), None)
    for place in {first, last} - {None}:
        content = messages[place]["content"]
        parts = [{"type": "text", "text": content}] if isinstance(content, str) else list(content)
        if parts and parts[-1].get("type") == "text":
            parts[-1] = {**parts[-1], **mark}
            messages[place] = {**messages[place], "content": parts}
    if body.get("tools"):
        body["tools"] = [*body["tools"][:-1], {**body["tools"][-1], **mark}]


class Thought(NamedTuple):
    """What a host is to be told about thinking: whether, the level's word (and the word for off), whether the catalogue
    maps the level, the effort field if the host takes one, the budget in tokens."""

    is_on: bool
    word: Optional[str]
    word_off: Optional[str]
    is_mapped: bool
    effort: Dict[str, Any]
    budget: Optional[int]

    @property
    def switch(self) -> Dict[str, str]:
        """The switch of DeepSeek's form."""
        return {"type": "enabled" if self.is_on else "disabled"}

    @property
    def either(self) -> Optional[str]:
        """The word for what it is, on or off."""
        return self.word if self.is_on else self.word_off


def _effort_or_off(thought: Thought, model: Model) -> Dict[str, Any]:
    """The effort; off only where the catalogue has a word for it."""
    is_mapped_off = not thought.is_on and bool(model.thinking_levels.get("off"))
    return {"reasoning_effort": thought.word_off} if is_mapped_off else thought.effort


def _template_fields(name: str, flag: str, has_effort: bool) -> Callable[[Thought, Model], Dict[str, Any]]:
    def fields(thought: Thought, model: Model) -> Dict[str, Any]:
        filled = fill_templates(model.flag(flag, {}), thought)
        return {**({name: filled} if filled else {}), **(_effort_or_off(thought, model) if has_effort else {})}
    return fields


# thinkingFormat → the request fields that say it. An absent word means that the host has none: then nothing is sent.
THINKING_FORMATS: Dict[str, Callable[[Thought, Model], Dict[str, Any]]] = {
    "openai": _effort_or_off,
    "openrouter": lambda t, model: {"reasoning": {"effort": t.either}},
    "deepseek": lambda t, model: {"thinking": t.switch, **t.effort},
    "zai": lambda t, model: {"thinking": {**t.switch, "clear_thinking": False} if t.is_on else t.switch,
                             **(t.effort if t.is_mapped else {})},
    "qwen": lambda t, model: {"enable_thinking": t.is_on, **t.effort},
    "qwen-chat-template": lambda t, model: {"chat_template_kwargs": {"enable_thinking": t.is_on,
                                                                     "preserve_thinking": True}},
    "chat-template": _template_fields("chat_template_kwargs", "chatTemplateKwargs", has_effort=False),
    "baseten": _template_fields("chat_template_args", "chatTemplateArgs", has_effort=True),
    "together": lambda t, model: {"reasoning": {"enabled": t.is_on}, **t.effort},
    "string-thinking": lambda t, model: {"thinking": t.either},
    "ant-ling": lambda t, model: {"reasoning": {"effort": t.word}} if t.is_on and t.is_mapped else {},
}


def thinking_fields(reasoning: Reasoning, model: Model) -> Dict[str, Any]:
    """The request fields by which a host of the model's `thinkingFormat` is told how hard to think."""
    level = fit_level(reasoning.level, model)
    if model.reasoning is False or level is None:
        return {}
    is_on = level != "off"
    word = model.thinking_levels.get(level, level)
    has_effort = is_on and model.flag("supportsReasoningEffort", True)
    thought = Thought(is_on, word, model.thinking_levels.get("off", "none"), level in model.thinking_levels,
                      {"reasoning_effort": word} if has_effort else {},
                      (reasoning.budget or LEVEL_BUDGETS[level]) if is_on else None)
    fields = THINKING_FORMATS[model.flag("thinkingFormat", "openai")](thought, model)
    if is_on and model.flag("thinkingTokenBudgetField") and model.flag("supportsThinkingTokenBudget"):
        fields = {**fields, model.flag("thinkingTokenBudgetField"): thought.budget}
    return fields


def fill_templates(templates: Mapping[str, Any], thought: Thought) -> Dict[str, Any]:
    """models.json chatTemplateKwargs: plain values, and {"$var": name, "omitWhenOff": bool} replaced by the variable."""
    variables = {"thinking.enabled": thought.is_on, "thinking.effort": thought.word if thought.is_on else None,
                 "thinking.budget": thought.budget}
    filled = {}
    for name, value in templates.items():
        if not isinstance(value, dict) or "$var" not in value:
            filled[name] = value
        elif thought.is_on or not value.get("omitWhenOff"):
            filled.update(present(**{name: variables.get(value["$var"])}))
    return filled


class CallIds:
    """The ids of one answer's tool calls: made up where a host gives none, made different where it gives one twice."""

    def __init__(self, stamp: Stamp) -> None:
        self._made = f"call_{stamp.id}"
        self._used: set[str] = set()

    def fresh(self, call_id: str) -> str:
        """The id to use for a call that came with `call_id`, which may be empty."""
        fresh = call_id or self._made
        while fresh in self._used:
            fresh = f"{call_id or self._made}_{len(self._used)}"
        self._used.add(fresh)
        return fresh


class ChatReader(Reader):
    """chat.completion.chunk events → events. Tool calls stay open until the finish reason, because their fragments may
    take turns; text and thinking end when something else begins."""

    def __init__(self, model: Model, stamp: Stamp) -> None:
        super().__init__()
        self._model = model
        self._stamp = stamp
        self._started = False
        self._stop: Optional[str] = None
        self._usage = Usage()
        self._details: List[Dict[str, Any]] = []
        self._calls: Dict[Any, Dict[str, str]] = {}
        self._newest: Dict[Any, Any] = {}
        self._last_call: Any = None
        self._call_ids = CallIds(stamp)
        self._refused = False

    def on_event(self, name: str, text: str) -> Iterator[Event]:
        """One chunk, or [DONE]."""
        if text.strip() == "[DONE]":
            yield from self._done(self._stop or "stop")
            return
        yield from self._chunk(loads(text))

    def whole(self, body: Dict[str, Any]) -> Iterator[Event]:
        """A chat.completion: the same as one chunk whose delta is the message."""
        choices = body.get("choices")
        if not isinstance(choices, list) or not choices:
            if body.get("error"):
                raise stream_error(body)
            raise UpstreamProtocolError("the provider's answer has no choices")
        choice = choices[0]
        message = choice["message"] if "message" in choice else {"content": choice["text"]}     # legacy Completions
        if not isinstance(message, dict):
            raise UpstreamProtocolError("the provider's answer has no message")
        message = dict(message)
        calls = message.get("tool_calls") or []
        if message.get("function_call"):
            calls = [{"function": message["function_call"]}]
        message["tool_calls"] = [{**call, "index": place} for place, call in enumerate(calls)]
        yield from self._chunk({**body, "choices": [{"delta": message, "finish_reason":
                                                     choice.get("finish_reason") or "stop"}]})
        yield from self._done(self._stop or "stop")

    def finish(self) -> Iterator[Event]:
        """End of the stream without [DONE]: fine if there was a finish reason."""
        if self._stop is None and (not self._started or self._model.flag("supportsFinishReason", True)):
            raise UpstreamProtocolError("the provider's stream ended without a finish reason")
        yield from self._done(self._stop or "stop")

    def _done(self, stop_reason: str) -> Iterator[Event]:
        if not self._started:
            raise UpstreamProtocolError("the provider's answer is empty")
        yield from self._close()
        if self._refused and stop_reason == "stop":
            stop_reason = "refusal"
        yield Done(stop_reason, self._usage)

    def _chunk(self, chunk: Any) -> Iterator[Event]:
        if not isinstance(chunk, dict):
            raise UpstreamProtocolError("the provider sent an event that is not an object")
        if chunk.get("error"):
            raise stream_error(chunk)
        choices = chunk.get("choices")
        choice = as_dict(choices[0]) if isinstance(choices, list) and choices else {}
        usage = chunk.get("usage") or choice.get("usage")       # Moonshot has it in the choice
        if isinstance(usage, dict):
            self._usage = read_chat_usage(usage)
        if not self._started and ("choices" in chunk or "id" in chunk):
            self._started = True
            yield Start(chunk.get("id") or "", chunk.get("model") or "")
        delta = choice["delta"] if "delta" in choice else {"content": choice.get("text")}   # legacy Completions
        if isinstance(delta, dict):
            yield from self._delta(delta)
        reason = choice.get("finish_reason")
        if reason in CHAT_FAILURES:
            raise UpstreamError(f"the provider stopped: {reason}")
        if reason and self._stop is None:
            self._stop = CHAT_STOP.get(reason, "stop")
            yield from self._close()

    def _delta(self, delta: Dict[str, Any]) -> Iterator[Event]:
        thinking = next((delta[name] for name in REASONING_FIELDS if isinstance(delta.get(name), str) and delta[name]), "")
        details = delta.get("reasoning_details")
        if isinstance(details, list):
            self._details.extend(item for item in details if isinstance(item, dict))
        if thinking:
            yield from self._write(Thinking, thinking)
        content = delta.get("content")
        if isinstance(content, list):           # Mistral's shape
            content = join_text_parts(content)
        if content:
            yield from self._write(Text, content + "")      # a TypeError, if it is no text
        if delta.get("refusal"):
            self._refused = True
            yield from self._write(Text, delta["refusal"])
        for call in delta.get("tool_calls") or ():
            yield from self._tool_call(call)

    def _write(self, kind: type, text: str) -> Iterator[Event]:
        other = Text if kind is Thinking else Thinking
        if other in self._parts:
            yield self._end(other)
        if kind not in self._parts:
            yield self._parts.start(kind, Thinking(maker=OpenAICompletions.name) if kind is Thinking else Text())
        yield self._parts.delta(kind, text)

    def _tool_call(self, call: Dict[str, Any]) -> Iterator[Event]:
        function = as_dict(call.get("function")) or as_dict(call.get("custom"))
        key = self._call_key(call, function)
        state = self._calls.setdefault(key, {"id": "", "name": "", "held": ""})
        if key not in self._parts:
            state["id"] = state["id"] or call.get("id") or ""
            state["name"] = state["name"] or function.get("name") or ""
            state["held"] += self._arguments(function)
            if not state["name"] or self._stop is not None:
                return                          # a call cannot be shown before its name is known
            for kind in (Thinking, Text):
                if kind in self._parts:
                    yield self._end(kind)
            yield self._parts.start(key, ToolCall(self._call_ids.fresh(state["id"]), state["name"]))
            if state["held"]:
                yield self._parts.delta(key, state["held"])
            return
        fragment = self._arguments(function)
        if fragment:
            yield self._parts.delta(key, fragment)

    def _arguments(self, function: Dict[str, Any]) -> str:
        arguments = function.get("arguments", function.get("input"))
        if isinstance(arguments, dict):         # some servers do not encode them
            return json_text(arguments)
        return arguments or ""

    def _call_key(self, call: Dict[str, Any], function: Dict[str, Any]) -> Any:
        """By index, else by id; some servers number every call 0 and only the id tells that a new one begins."""
        index, call_id = call.get("index"), call.get("id")
        place = index if index is not None else call_id if call_id else self._last_call
        key = self._newest.get(place, place)
        known = self._calls.get(key)
        if known and known["id"] and call_id and call_id != known["id"] and function.get("name"):
            key = self._newest[place] = (place, call_id)
        self._last_call = place
        return key

    def _end(self, key: Any) -> PartEnd:
        signature = None
        if key is Thinking and any("data" in item or "signature" in item for item in self._details):
            signature, self._details = json_text(self._details), []
        return self._parts.end(key, signature)

    def _close(self) -> Iterator[Event]:
        for kind in (Thinking, Text):
            if kind in self._parts:
                yield self._end(kind)
        if any("data" in item for item in self._details):       # sealed reasoning without any visible
            sealed = Thinking("", json_text(self._details), True, OpenAICompletions.name)
            self._details = []
            yield self._parts.start("sealed", sealed)
        yield from self._parts.end_all()


def join_text_parts(parts: List[Any]) -> str:
    """The text of content that came as an array of parts."""
    return "".join(part.get("text") or "" for part in map(as_dict, parts) if part.get("type") == "text")


def read_chat_usage(usage: Dict[str, Any]) -> Usage:
    """OpenAI's usage, and its variants at DeepSeek (prompt_cache_hit_tokens) and Kimi (cached_tokens)."""
    prompt, completion = as_dict(usage.get("prompt_tokens_details")), as_dict(usage.get("completion_tokens_details"))
    cached = token_count(prompt.get("cached_tokens") or usage.get("prompt_cache_hit_tokens") or usage.get("cached_tokens"))
    written = token_count(prompt.get("cache_write_tokens"))
    return Usage(max(0, token_count(usage.get("prompt_tokens")) - cached - written),
                 token_count(usage.get("completion_tokens")), cached, written,
                 token_count(completion.get("reasoning_tokens")))


# --- anthropic-messages -----------------------------------------------------------------------------------------------

ANTHROPIC_STOP = {"end_turn": "stop", "stop_sequence": "stop_sequence", "max_tokens": "length", "tool_use": "tool_use",
                  "refusal": "refusal", "pause_turn": "pause", "model_context_window_exceeded": "overflow"}
ANTHROPIC_CHOICES = {"auto": "auto", "none": "none", "required": "any", "tool": "tool"}
ANTHROPIC_VERSION = "2023-06-01"    # the version that still has temperature, top_p and top_k
OAUTH_MARK = "sk-ant-oat"           # Claude subscription tokens; the API takes them as bearer tokens with these extras
OAUTH_BETAS = "claude-code-20250219,oauth-2025-04-20"
OAUTH_IDENTITY = "You are Claude Code, Anthropic's official CLI for Claude."
OAUTH_AGENT = "claude-cli/2.1.322"
CARRIED_TO_ANTHROPIC = ("anthropic-version", "anthropic-beta")     # end-to-end headers of the protocol
# What a client that brings its own credential means for us, or for the connection, rather than for the provider.
NOT_PASSED = re.compile(r"host|connection|keep-alive|proxy-.*|te|trailer|transfer-encoding|upgrade|content-length|expect|"
                        r"accept-encoding|cookie|origin|referer|forwarded|via|x-forwarded-.*|x-real-ip|x-pigateway-.*|"
                        r"authorization|x-api-key|x-goog-api-key|api-key|x-auth-token")
CARRIED_TO_OPENAI = ("openai-beta", "openai-organization", "openai-project")


# Claude Code's own tools: a subscription token is to see them spelt like this.
OAUTH_TOOLS = {name.lower(): name for name in (
    "Read", "Write", "Edit", "Bash", "Grep", "Glob", "AskUserQuestion", "EnterPlanMode", "ExitPlanMode", "KillShell",
    "NotebookEdit", "Skill", "Task", "TaskOutput", "TodoWrite", "WebFetch", "WebSearch")}


def oauth_tool_names(names: Sequence[str]) -> Dict[str, str]:
    """As sent → the client's own, for all of a client's tools; {} when none has to be spelt differently. A name that
    another tool already has is left alone."""
    out: Dict[str, str] = {}
    for name in names:
        wanted = OAUTH_TOOLS.get(name.lower(), name)
        out.setdefault(wanted if wanted not in names and wanted not in out else name, name)
    return out if any(name != own for name, own in out.items()) else {}


def client_tool_name(name: Any, names: Mapping[str, str]) -> Any:
    """The client's own name of a tool; `names` as `oauth_tool_names` gives them."""
    if not isinstance(name, str):
        return name
    return names.get(name) or names.get(OAUTH_TOOLS.get(name.lower(), "")) or name


def rename_tools(request: Request, names: Mapping[str, str]) -> Request:
    """`request` with its tools named as they are sent; `names` as `oauth_tool_names` gives them."""
    if not names:
        return request
    sent = {own: name for name, own in names.items()}

    def rename(part: Part) -> Part:
        return replace(part, name=sent[part.name]) if isinstance(part, ToolCall) and part.name in sent else part

    choice = request.tool_choice
    return replace(
        request, tools=tuple(replace(tool, name=sent.get(tool.name, tool.name)) for tool in request.tools),
        tool_choice=choice._replace(name=sent.get(choice.name, choice.name)) if choice and choice.name else choice,
        messages=tuple(replace(message, parts=tuple(map(rename, message.parts))) for message in request.messages))


class AnthropicMessages(UpstreamProtocol):
    """Anthropic Messages and the hosts that speak it: POST {base}/v1/messages."""

    name = "anthropic-messages"

    def marks_cache(self, model: Model) -> bool:
        """See `UpstreamProtocol.marks_cache`."""
        return True

    def carries(self, model: Model) -> FrozenSet[str]:
        """What the Messages API has a field for."""
        fields = {"stop", "parallel_tools", "user"}
        if model.flag("supportsTemperature", True):
            fields |= {"temperature", "top_p", "top_k"}
        if model.flag("supportsOutputFormat", True):
            fields.add("output")
        if model.reasoning:
            fields.add("reasoning")
        return frozenset(fields)

    def replays(self, part: Thinking, model: Model) -> bool:
        """Only what Claude signed; unsigned thinking is a 400, except at hosts that sign nothing."""
        if not part.signature:
            return bool(model.flag("allowEmptySignature")) and not part.redacted
        return part.maker == self.name

    def fit(self, request: Request, model: Model) -> Tuple[Request, List[str]]:
        """With thinking on, the API refuses sampling parameters and forced tool calls; and a tool loop that began without
        signed thinking cannot go on with a thinking budget."""
        reasoning = request.reasoning
        if reasoning is None or reasoning.level == "off":
            return request, []
        forced = request.tool_choice is not None and request.tool_choice.kind in ("required", "tool")
        if forced or (not model.flag("forceAdaptiveThinking") and self._in_unsigned_loop(request)):
            return replace(request, reasoning=None), ["reasoning"]
        sampling = [name for name in ("temperature", "top_p", "top_k") if getattr(request, name) is not None]
        return (replace(request, temperature=None, top_p=None, top_k=None),
                [name for name in sampling if getattr(request, name) != 1])

    def _in_unsigned_loop(self, request: Request) -> bool:
        if not request.messages or request.messages[-1].role != "tool":
            return False
        last = next((message for message in reversed(request.messages) if message.role == "assistant"), None)
        return last is None or not any(isinstance(part, Thinking) for part in last.parts)

    def tool_names(self, request: Request, credential: Credential) -> Mapping[str, str]:
        """See `UpstreamProtocol.tool_names`."""
        return oauth_tool_names([tool.name for tool in request.tools]) if credential.kind == "oauth" else {}

    def build(self, request: Request, model: Model, credential: Credential) -> Call:
        """See `UpstreamProtocol.build`."""
        messages = self._messages(request.messages)
        system = [{"type": "text", "text": text.text} for text in request.system]
        if not messages:                        # a system prompt alone: the API needs a user turn
            messages, system = [{"role": "user", "content": system}], []
            if not messages[0]["content"]:
                raise BadRequest("messages: there is nothing but blanks in them", param="messages")
        if credential.kind == "oauth":
            system.insert(0, {"type": "text", "text": OAUTH_IDENTITY})
        max_tokens = request.max_tokens or model.max_tokens or DEFAULT_MAX_TOKENS
        thinking, effort, max_tokens = self.thinking(request, model, max_tokens)
        config = present(effort=effort, format=self._format(request.output))
        body = present(
            model=model.id, max_tokens=max_tokens, messages=messages, system=system or None,
            tools=[self._tool(tool, model) for tool in request.tools] or None,
            tool_choice=self._tool_choice(request), thinking=thinking, output_config=config or None,
            temperature=None if request.temperature is None else min(request.temperature, 1),
            top_p=request.top_p, top_k=request.top_k, stop_sequences=list(request.stop) or None,
            metadata={"user_id": request.user} if request.user else None, stream=request.stream or None)
        self._mark_cache(body, model)
        body.update(model.sampling)
        headers = self.headers(model, credential, {})
        return Call("POST", join_url(model.base_url, "/v1/messages"), headers, dumps(body).encode("ascii"))

    def headers(self, model: Model, credential: Credential, client: Mapping[str, str]) -> Dict[str, str]:
        """Request headers; those of the client that the protocol defines are carried."""
        scheme = model.flag("auth") or ("bearer" if credential.kind == "oauth" else "x-api-key")
        headers = {"anthropic-version": ANTHROPIC_VERSION, **authorization(model, credential, scheme)}
        if credential.kind == "client":         # its own program, to its own provider: everything as it said it
            return {**headers, **client}
        headers.update((name, client[name]) for name in CARRIED_TO_ANTHROPIC if name in client)
        if credential.kind == "oauth":
            betas = headers.get("anthropic-beta")
            headers.update({"user-agent": OAUTH_AGENT, "x-app": "cli",
                            "anthropic-beta": f"{OAUTH_BETAS},{betas}" if betas else OAUTH_BETAS})
        return headers

    def _messages(self, messages: Iterable[Message]) -> List[Dict[str, Any]]:
        """Turns that alternate, begin with the user and have a tool turn's results first in the user turn behind it."""
        out: List[Dict[str, Any]] = []
        for message in messages:
            role = "assistant" if message.role == "assistant" else "system" if message.role == "system" else "user"
            blocks = [block for part in message.parts for block in self._blocks(part)]
            late = [block for block in blocks if block.get("type") == "late"]
            blocks = [block for block in blocks if block.get("type") != "late"]
            blocks.extend(image for block in late for image in block["images"])
            if not blocks:
                continue
            if out and out[-1]["role"] == role:
                out[-1]["content"].extend(blocks)
            else:
                out.append({"role": role, "content": blocks})
        if out and out[0]["role"] == "assistant":
            out.insert(0, {"role": "user", "content": [{"type": "text", "text": "…"}]})
        return out

    def _blocks(self, part: Part) -> List[Dict[str, Any]]:
        if isinstance(part, Text):
            return [{"type": "text", "text": part.text}] if part.text.strip() else []
        if isinstance(part, Thinking):
            if part.redacted:
                return [{"type": "redacted_thinking", "data": part.signature}]
            return [{"type": "thinking", "thinking": part.text, "signature": part.signature or ""}]
        if isinstance(part, ToolCall):
            arguments = repair_json_object(part.arguments)
            return [{"type": "tool_use", "id": fit_id(part.id, ANTHROPIC_ID_LIMIT), "name": part.name,
                     "input": {"malformed_arguments": part.arguments} if arguments is None else arguments}]
        if isinstance(part, ToolResult):
            return self._result(part)
        return [self._media(part)]

    def _media(self, part: Union[Image, Document]) -> Dict[str, Any]:
        block: Dict[str, Any] = {"type": "image" if isinstance(part, Image) else "document"}
        if part.url:
            block["source"] = {"type": "url", "url": part.url}
        elif part.media_type == "text/plain" and part.data is not None:
            text = base64.b64decode(part.data).decode("utf-8", "replace")
            block["source"] = {"type": "text", "media_type": "text/plain", "data": text}
        else:
            block["source"] = {"type": "base64", "media_type": part.media_type, "data": part.data}
        if isinstance(part, Document) and part.name:
            block["title"] = part.name
        return block

    def _result(self, result: ToolResult) -> List[Dict[str, Any]]:
        blocks = [block for part in result.parts for block in self._blocks(part)]
        out: Dict[str, Any] = {"type": "tool_result", "tool_use_id": fit_id(result.call_id, ANTHROPIC_ID_LIMIT)}
        images = [block for block in blocks if block["type"] != "text"]
        if result.is_error:                     # an error result may hold text only
            blocks, out["is_error"] = [block for block in blocks if block["type"] == "text"], True
        if blocks:
            out["content"] = blocks
        return [out, {"type": "late", "images": images}] if result.is_error and images else [out]

    def _tool(self, tool: Tool, model: Model) -> Dict[str, Any]:
        strict = tool.strict if tool.strict and model.flag("supportsStrictTools") else None
        schema = {"type": "object", **tool.schema}
        return present(name=tool.name, description=tool.description, input_schema=schema, strict=strict)

    def _tool_choice(self, request: Request) -> Optional[Dict[str, Any]]:
        if not request.tools or (request.tool_choice is None and request.parallel_tools is not False):
            return None
        choice = request.tool_choice or ToolChoice("auto")
        out = present(type=ANTHROPIC_CHOICES[choice.kind], name=choice.name)
        if request.parallel_tools is False and choice.kind != "none":
            out["disable_parallel_tool_use"] = True
        return out

    def _format(self, output: Optional[OutputFormat]) -> Optional[Dict[str, Any]]:
        return {"type": "json_schema", "schema": output.schema} if output and output.schema is not None else None

    def thinking(self, request: Request, model: Model, max_tokens: int,
                  ) -> Tuple[Optional[Dict[str, Any]], Optional[str], int]:
        """(thinking, effort, max_tokens). A budget comes on top of what was asked for the answer, within the model's
        limit; where too little is left for both, thinking stays off."""
        if request.reasoning is None:
            return None, None, max_tokens
        level = fit_level(request.reasoning.level, model)
        if level is None:
            return None, None, max_tokens
        if level == "off":
            return {"type": "disabled"}, None, max_tokens
        if model.flag("forceAdaptiveThinking"):
            effort = model.thinking_levels.get(level) or ANTHROPIC_EFFORTS[level]
            return {"type": "adaptive", "display": "summarized"}, effort, max_tokens
        budget = max(MIN_BUDGET, request.reasoning.budget or LEVEL_BUDGETS[level])
        limit = min((request.max_tokens or max_tokens) + budget, model.max_tokens or sys.maxsize)
        budget = min(budget, limit - MIN_BUDGET)
        if budget < MIN_BUDGET:
            return None, None, max_tokens
        return {"type": "enabled", "budget_tokens": budget}, None, limit

    def _mark_cache(self, body: Dict[str, Any], model: Model) -> None:
        """Cache marks behind what stays the same from turn to turn: tools, system, the last user turn. Three of the four
        that the API allows; without them every turn pays for the whole conversation again."""
        blocks = [body["system"][-1]] if body.get("system") else []
        if body.get("tools") and model.flag("supportsCacheControlOnTools", True):
            blocks.append(body["tools"][-1])
        if body["messages"][-1]["role"] == "user":
            blocks.append(body["messages"][-1]["content"][-1])
        for block in blocks:
            block["cache_control"] = {"type": "ephemeral"}

    def reader(self, model: Model, stamp: Stamp) -> Reader:
        """See `UpstreamProtocol.reader`."""
        return AnthropicReader()

    def parse_error(self, status: int, headers: Mapping[str, str], body: bytes, now: float) -> GatewayError:
        """The body is kept for Anthropic clients, which recover by its exact wording. Not a 401: that would make them
        throw away their own key."""
        error = super().parse_error(status, headers, body, now)
        if status != 401 and isinstance(error_object(body), dict):
            error.provider_reply = ProviderReply(status, headers.get("content-type", "application/json"), body)
        return error


ANTHROPIC_EFFORTS = {"minimal": "low", "low": "low", "medium": "medium", "high": "high", "xhigh": "high", "max": "high"}


def error_object(body: bytes) -> Any:
    """The `error` of an Anthropic error body, None when it is not one."""
    try:
        return as_dict(json.loads(body)).get("error")
    except (ValueError, RecursionError):
        return None


def system_blocks(system: Any) -> List[Any]:
    """Anthropic's `system` as an array."""
    if isinstance(system, str):
        return [{"type": "text", "text": system}] if system else []
    return system or []


_MODEL_VALUE = re.compile(rb'"model"\s*:\s*("[^"\\]*(?:\\.[^"\\]*)*")')


def splice_model(body: bytes, data: Mapping[str, Any], model_id: str) -> bytes:
    """The JSON bytes `body` with the value of its top-level "model" replaced, every other byte as it was.

    The first "model" in the text may be a nested one, so each is tried until the result parses to what is wanted."""
    body = body[len(codecs.BOM_UTF8):] if body.startswith(codecs.BOM_UTF8) else body    # no JSON for everybody
    if data.get("model") == model_id:
        return body
    wanted = {**data, "model": model_id}
    value = json_text(model_id).encode("utf-8")
    tries, match = 0, _MODEL_VALUE.search(body)         # not `finditer`, which leaves what `Opener` tells of
    while match:
        found, match = match, _MODEL_VALUE.search(body, match.end())
        if found.end(1) - found.start(1) > 4096 or json.loads(found.group(1)) != data.get("model"):
            continue
        tries += 1
        if tries > 4:                           # each try parses the whole body
            break
        candidate = body[:found.start(1)] + value + body[found.end(1):]
        if clean_strings(json.loads(candidate.decode("utf-8-sig"))) == wanted:
            return candidate
    return dumps(wanted).encode("ascii")


def has_repeated_keys(body: bytes) -> bool:
    """Whether the top-level object of a JSON body may name its model twice: of two, a provider might take the other one
    than the gateway has checked. Written with escapes, a key would not be found by its letters."""
    if body.count(b'"model"') < 2 and b"\\u00" not in body:
        return False
    repeated = False

    def note(pairs: List[Tuple[str, Any]]) -> Dict[str, Any]:
        nonlocal repeated
        names = [name for name, _ in pairs]
        repeated = len(set(names)) != len(names)        # the outermost object comes last
        return {}

    json.loads(body.decode("utf-8-sig"), object_pairs_hook=note)
    return repeated


class AnthropicReader(Reader):
    """Anthropic's server-sent events → events."""

    def __init__(self) -> None:
        super().__init__()
        self._started = False
        self._signatures: Dict[Any, str] = {}
        self._stop: Optional[str] = None
        self._detail: Optional[str] = None
        self._usage: Dict[str, Any] = {}

    def on_event(self, name: str, text: str) -> Iterator[Event]:
        """Dispatches to a method by event type; unknown ones are skipped."""
        handler = self.handlers.get(name)
        if handler is None and name:
            return
        data = loads(text)
        handler = handler or self.handlers.get(data["type"])
        if handler:
            yield from handler(self, data)

    def whole(self, body: Dict[str, Any]) -> Iterator[Event]:
        """A message: the same as its events."""
        if body.get("error"):
            raise stream_error(body)
        if not isinstance(body.get("content"), list):
            raise UpstreamProtocolError("the provider's answer has no content")
        yield from self._message_start({"message": body})
        for index, block in enumerate(body["content"]):
            yield from self._block_start({"index": index, "content_block": block})
            if block.get("type") == "thinking":
                self._signatures[index] = block.get("signature") or ""
            yield from self._block_stop({"index": index})
        yield from self._message_delta({"delta": body, "usage": body.get("usage")})
        yield from self._message_stop({})

    def finish(self) -> Iterator[Event]:
        """The end of the stream before message_stop is a cut, however clean."""
        raise UpstreamProtocolError("the provider's stream ended before message_stop")
        yield

    def _message_start(self, data: Dict[str, Any]) -> Iterator[Event]:
        message = data["message"]
        self._started = True
        self._note_usage(message.get("usage"))
        yield Start(message.get("id") or "", message.get("model") or "", read_anthropic_usage(self._usage))

    def _note_usage(self, usage: Any) -> None:
        self._usage.update((name, value) for name, value in as_dict(usage).items() if value is not None)

    def _block_start(self, data: Dict[str, Any]) -> Iterator[Event]:
        if not self._started:                   # llama.cpp leaves message_start out when its first token is half a character
            self._started = True
            yield Start()
        key, block = data["index"], data["content_block"]
        kind = block["type"]
        if kind == "text":
            yield self._parts.start(key, Text())
        elif kind == "thinking":
            yield self._parts.start(key, Thinking(maker=AnthropicMessages.name))
        elif kind == "redacted_thinking":
            yield self._parts.start(key, Thinking("", block["data"], True, AnthropicMessages.name))
        elif kind == "tool_use":
            yield self._parts.start(key, ToolCall(block["id"], block["name"]))
        first = {"text": block.get("text"), "thinking": block.get("thinking"),
                 "tool_use": json_text(block["input"]) if block.get("input") else ""}.get(kind)
        if first:
            yield self._parts.delta(key, first)

    def _block_delta(self, data: Dict[str, Any]) -> Iterator[Event]:
        key, delta = data["index"], data["delta"]
        if key not in self._parts:              # a block of a kind that other clients have no word for
            return
        if delta["type"] == "signature_delta":
            self._signatures[key] = self._signatures.get(key, "") + delta["signature"]
        field_name = ANTHROPIC_DELTAS.get(delta["type"])
        if field_name and delta[field_name]:
            yield self._parts.delta(key, delta[field_name])

    def _block_stop(self, data: Dict[str, Any]) -> Iterator[Event]:
        key = data["index"]
        if key in self._parts:
            yield self._parts.end(key, self._signatures.pop(key, None) or None)

    def _message_delta(self, data: Dict[str, Any]) -> Iterator[Event]:
        delta = data["delta"]
        self._stop = delta.get("stop_reason") or self._stop
        self._detail = delta.get("stop_sequence") or as_dict(delta.get("stop_details")).get("explanation") or self._detail
        self._note_usage(data.get("usage"))
        yield from ()

    def _message_stop(self, data: Dict[str, Any]) -> Iterator[Event]:
        if not self._started:
            raise UpstreamProtocolError("the provider's stream has no message_start")
        yield from self._parts.end_all()
        yield Done(ANTHROPIC_STOP.get(self._stop or "", "stop"), read_anthropic_usage(self._usage), self._detail)

    def _error(self, data: Dict[str, Any]) -> Iterator[Event]:
        raise stream_error(data)
        yield

    handlers: Mapping[str, Callable[..., Iterator[Event]]] = {
        "message_start": _message_start, "content_block_start": _block_start, "content_block_delta": _block_delta,
        "content_block_stop": _block_stop, "message_delta": _message_delta, "message_stop": _message_stop,
        "error": _error}


ANTHROPIC_DELTAS = {"text_delta": "text", "thinking_delta": "thinking", "input_json_delta": "partial_json"}


def read_anthropic_usage(usage: Dict[str, Any]) -> Usage:
    """Anthropic's usage: input_tokens already excludes what the cache gave or took."""
    creation, details = as_dict(usage.get("cache_creation")), as_dict(usage.get("output_tokens_details"))
    return Usage(token_count(usage.get("input_tokens")), token_count(usage.get("output_tokens")),
                 token_count(usage.get("cache_read_input_tokens")),
                 token_count(usage.get("cache_creation_input_tokens")), token_count(details.get("thinking_tokens")),
                 token_count(creation.get("ephemeral_1h_input_tokens")))


# --- openai-responses -------------------------------------------------------------------------------------------------

RESPONSES_CUT = {"max_output_tokens": "length", "content_filter": "refusal"}    # incomplete_details.reason; else length
RESPONSES_MIN_OUTPUT = 16       # max_output_tokens below this is a 400
RESPONSES_LIMIT = 64            # characters of call_id, user, prompt_cache_key and a schema's name
RESPONSES_SEAL = "reasoning.encrypted_content"


class OpenAIResponses(UpstreamProtocol):
    """OpenAI Responses and the hosts that speak it: POST {base}/responses. Nothing is stored there: earlier reasoning
    goes back as the items that it came in.

    The class attributes are what hosts of this wire format differ in; compat flags of the model have the last word."""

    name = "openai-responses"
    forwards = frozenset({"prompt_cache_key"})
    auth = "bearer"                             # how the key is sent unless the row's `auth` says otherwise
    takes_limit = True                          # supportsMaxOutputTokens
    takes_strict = False                        # supportsStrictMode
    unset_strict: Optional[bool] = False        # an absent `strict` means true here, unlike in Chat Completions

    def carries(self, model: Model) -> FrozenSet[str]:
        """What the Responses API has a field for: no stop sequences, seed, penalties, logit_bias or top_k."""
        fields = {"temperature", "top_p", "parallel_tools", "output", "json_object", "user", "verbosity"}
        if model.reasoning:
            fields.add("reasoning")
        if not model.flag("supportsTemperature", True):
            fields -= {"temperature", "top_p"}
        return frozenset(fields)

    def replays(self, part: Thinking, model: Model) -> bool:
        """Only whole reasoning items of this protocol, and only to a model that may reason."""
        return (part.maker == OpenAIResponses.name and model.reasoning is not False
                and reasoning_item(part.signature) is not None)

    def fit(self, request: Request, model: Model) -> Tuple[Request, List[str]]:
        """Leaves out the output limit where the host has no field for it."""
        if request.max_tokens is None or model.flag("supportsMaxOutputTokens", self.takes_limit):
            return request, []
        return replace(request, max_tokens=None), ["max_tokens"]

    def build(self, request: Request, model: Model, credential: Credential) -> Call:
        """See `UpstreamProtocol.build`."""
        return Call("POST", self.url(model, credential), self.headers(request, model, credential),
                    dumps(self.body(request, model, credential)).encode("ascii"))

    def relay(self, path: str, body: Dict[str, Any], request: Request, model: Model, credential: Credential) -> Call:
        """The call that sends a finished body to some path of the OpenAI API."""
        body = {**body, "model": self.wire_model(model, credential)}
        return Call("POST", self.url(model, credential, path), self.headers(request, model, credential),
                    dumps(body).encode("ascii"))

    def url(self, model: Model, credential: Credential, path: str = "/responses") -> str:
        """Where requests go."""
        return join_url(model.base_url, path)

    def headers(self, request: Request, model: Model, credential: Credential) -> Dict[str, str]:
        """Request headers."""
        return {**session_headers(request, model), **authorization(model, credential, model.flag("auth", self.auth))}

    def wire_model(self, model: Model, credential: Credential) -> str:
        """The model's name as the host knows it."""
        return model.id

    def body(self, request: Request, model: Model, credential: Credential) -> Dict[str, Any]:
        """The request body for a normalised request."""
        limit = None if request.max_tokens is None else max(request.max_tokens, RESPONSES_MIN_OUTPUT)
        body = present(
            model=self.wire_model(model, credential), input=self.input(request, model), store=False,
            stream=request.stream or None, max_output_tokens=limit, temperature=request.temperature,
            top_p=request.top_p, user=fit_length(request.user or "") or None,
            text=self._text(request) or None, prompt_cache_key=session_key(request, model),
            **reasoning_fields(request.reasoning, model))
        if request.tools:
            body.update(present(tools=[self._tool(tool, model) for tool in request.tools],
                                tool_choice=self._tool_choice(request, model),
                                parallel_tool_calls=request.parallel_tools))
        body.update(model.sampling)
        return body

    def adapt(self, request: Request, model: Model, credential: Credential) -> Tuple[Dict[str, Any], List[str]]:
        """The body of a client of this API, edited only where this host or its model demands it, and the names of what
        had to go. Nothing is stored, so that reasoning has to come sealed, and goes back only if it is."""
        dropped: List[str] = []
        body = {**request.data, "model": self.wire_model(model, credential), "store": False}
        if isinstance(body["input"], list):
            body["input"] = [item for item in body["input"] if not is_lost_reasoning(item, request.foreign)]
        limit = fit_max_tokens(request.max_tokens, model)
        if limit is not None:
            body["max_output_tokens"] = max(limit, RESPONSES_MIN_OUTPUT)
            if not model.flag("supportsMaxOutputTokens", self.takes_limit):
                del body["max_output_tokens"]
                dropped.append("max_output_tokens")
        dropped.extend(adapt_reasoning(body, request.reasoning, model))
        body.update(model.sampling)
        return body, dropped

    def input(self, request: Request, model: Model) -> List[Dict[str, Any]]:
        """The conversation as input items."""
        custom = grammar_tools(request, model)
        custom_ids = frozenset(part.id for message in request.messages for part in message.parts
                               if isinstance(part, ToolCall) and part.name in custom)
        items = [self._system(request.system, model)] if request.system else []
        for message in request.messages:
            items.extend(self._message(message, model, custom_ids))
        for place, item in enumerate(items):
            if item.get("type") == "message":   # required; any will do, since nothing is stored
                item["id"] = f"msg_{place}"
        return items

    def _system(self, parts: Iterable[Part], model: Model) -> Dict[str, Any]:
        is_developer = model.reasoning and model.flag("supportsDeveloperRole", True)
        return {"role": "developer" if is_developer else "system",
                "content": "\n\n".join(part.text for part in parts if isinstance(part, Text))}

    def _message(self, message: Message, model: Model, custom_ids: FrozenSet[str]) -> List[Dict[str, Any]]:
        if message.role == "system":
            return [self._system(message.parts, model)]
        if message.role == "tool":
            return [self._result(part, custom_ids) for part in message.parts if isinstance(part, ToolResult)]
        if message.role == "assistant":
            return self._assistant(message, custom_ids)
        return [{"role": "user", "content": [self._content(part) for part in message.parts]}]

    def _assistant(self, message: Message, custom_ids: FrozenSet[str]) -> List[Dict[str, Any]]:
        items = [item for part in message.parts for item in self._output_item(part, custom_ids)]
        while items and items[-1].get("type") == "reasoning":
            items.pop()         # reasoning without a message or call behind it in its turn is a 400
        return items

    def _output_item(self, part: Part, custom_ids: FrozenSet[str]) -> List[Dict[str, Any]]:
        if isinstance(part, Text):
            return [{"type": "message", "role": "assistant", "status": "completed",
                     "content": [{"type": "output_text", "text": part.text, "annotations": []}]}]
        if isinstance(part, Thinking):
            item = reasoning_item(part.signature)
            return [item] if item else []
        if not isinstance(part, ToolCall):
            return []
        if part.id in custom_ids:
            return [{"type": "custom_tool_call", "call_id": fit_id(part.id, RESPONSES_LIMIT), "name": part.name,
                     "input": custom_input(part)}]
        return [{"type": "function_call", "call_id": fit_id(part.id, RESPONSES_LIMIT), "name": part.name,
                 "arguments": part.arguments or "{}"}]

    def _result(self, result: ToolResult, custom_ids: FrozenSet[str]) -> Dict[str, Any]:
        """A string, or an array when there is more than text."""
        text = "\n".join(part.text for part in result.parts if isinstance(part, Text))
        shown = [self._content(part) for part in result.parts if isinstance(part, (Image, Document))]
        if result.is_error and not text.lower().startswith("error"):
            text = f"Error: {text}"
        output: Any = text if text or shown else EMPTY_RESULT
        if shown:
            output = [{"type": "input_text", "text": text}, *shown] if text else shown
        return {"type": "custom_tool_call_output" if result.call_id in custom_ids else "function_call_output",
                "call_id": fit_id(result.call_id, RESPONSES_LIMIT), "output": output}

    def _content(self, part: Part) -> Dict[str, Any]:
        if isinstance(part, Image):
            return {"type": "input_image", "detail": part.detail or "auto", "image_url": part.url or data_url(part)}
        if not isinstance(part, Document):
            return {"type": "input_text", "text": part.text if isinstance(part, Text) else ""}
        if part.url:
            return {"type": "input_file", "file_url": part.url}
        if part.media_type == "text/plain":     # files are PDFs to most hosts; text fits everywhere
            return {"type": "input_text", "text": base64.b64decode(part.data or "").decode("utf-8", "replace")}
        return {"type": "input_file", "filename": part.name or "document.pdf", "file_data": data_url(part)}

    def _tool(self, tool: Tool, model: Model) -> Dict[str, Any]:
        if tool.custom and model.flag("supportsOpenAIGrammarTools"):
            return present(type="custom", name=tool.name, description=tool.description)
        out = present(type="function", name=tool.name, description=tool.description, parameters=tool.schema)
        if model.flag("supportsStrictMode", self.takes_strict):
            out["strict"] = self.unset_strict if tool.strict is None else tool.strict
        return out

    def _tool_choice(self, request: Request, model: Model) -> Any:
        choice = request.tool_choice
        if choice is None or choice.kind != "tool":
            return choice and choice.kind
        return {"type": "custom" if choice.name in grammar_tools(request, model) else "function", "name": choice.name}

    def _text(self, request: Request) -> Dict[str, Any]:
        output = request.output
        form: Optional[Dict[str, Any]] = None
        if output:
            form = {"type": "json_object"} if output.schema is None else present(
                type="json_schema", name=fit_id(output.name, RESPONSES_LIMIT), schema=output.schema,
                strict=output.strict)
        return present(format=form, verbosity=request.verbosity)

    def reader(self, model: Model, stamp: Stamp) -> Reader:
        """See `UpstreamProtocol.reader`."""
        return ResponsesReader(stamp)

    def parse_error(self, status: int, headers: Mapping[str, str], body: bytes, now: float) -> GatewayError:
        """Of a rate limit the pause may be said in its text only."""
        error = super().parse_error(status, headers, body, now)
        if isinstance(error, RateLimited) and error.retry_after is None:
            error.retry_after = read_delay(error.message)
        return error


def reasoning_item(signature: Optional[str]) -> Optional[Dict[str, Any]]:
    """The reasoning item that a signature of this protocol is the JSON text of; None when it is something else, since
    signatures come back through clients."""
    try:
        item = loads(signature or "")
    except (ValueError, RecursionError):
        return None
    return item if isinstance(item, dict) and item.get("type") == "reasoning" else None


def grammar_tools(request: Request, model: Model) -> FrozenSet[str]:
    """The names of the tools that go out as custom tools."""
    return custom_tools(request) if model.flag("supportsOpenAIGrammarTools") else frozenset()


def fit_length(text: str) -> str:
    """`text` if it is short enough, else a hash of it; for names that only have to be the same each time."""
    return text if len(text) <= RESPONSES_LIMIT else fit_id(text, RESPONSES_LIMIT)


def session_key(request: Request, model: Model) -> Optional[str]:
    """`prompt_cache_key`: the client's session, by which the host finds the cached prompt; None when none is named."""
    is_wanted = request.session and model.flag("promptCacheKeyMode") != "disabled"
    return fit_length(request.session) if is_wanted else None


def reasoning_fields(reasoning: Optional[Reasoning], model: Model) -> Dict[str, Any]:
    """`reasoning` and `include` for a model that reasons: the level's word, a summary to show, the sealed item to give
    back. A client that names no level gets the model's own, and what the host shows of it unasked."""
    if not model.reasoning:
        return {}
    level = fit_level(reasoning.level, model) if reasoning else None
    if level == "off":
        word = model.thinking_levels.get("off", "none")
        return {"reasoning": {"effort": word}} if model.flag("supportsReasoningOff", True) else {}
    fields: Dict[str, Any] = {"include": [RESPONSES_SEAL]}
    if level:
        word = model.thinking_levels.get(level, level) if model.flag("supportsReasoningEffort", True) else None
        fields["reasoning"] = present(effort=word, summary="auto")
    return fields


def adapt_reasoning(body: Dict[str, Any], reasoning: Optional[Reasoning], model: Model) -> List[str]:
    """Puts the effort into the model's word and asks for the seal of its reasoning; takes both away from a model that
    does not reason. What a model takes of which nothing is known is left to the client. The names of what is lost."""
    names = body.get("include") or []
    if model.reasoning is False:
        body["include"] = [name for name in names if name != RESPONSES_SEAL]
        for name in ("reasoning", *(() if body["include"] else ("include",))):
            body.pop(name, None)
        return ["reasoning"] if reasoning and reasoning.level != "off" else []
    if model.reasoning and RESPONSES_SEAL not in names:
        body["include"] = [*names, RESPONSES_SEAL]
    if reasoning and (model.reasoning or model.level):
        fields = reasoning_fields(reasoning, replace(model, reasoning=True))
        kept = {name: value for name, value in as_dict(body.get("reasoning")).items() if name != "effort"}
        body["reasoning"] = {**kept, **present(effort=as_dict(fields.get("reasoning")).get("effort"))}
    return []


def is_lost_reasoning(item: Any, foreign: FrozenSet[str]) -> bool:
    """Whether an input item is reasoning that the host would refuse: it was sealed elsewhere, or is kept nowhere."""
    if as_dict(item).get("type") != "reasoning":
        return False
    sealed = item.get("encrypted_content")
    return sealed in foreign or sealed.startswith(_SEAL) if sealed else not item.get("content")


class OutputItem:
    """An output item that has begun: as it was announced, the part that it becomes, and its text so far, which is not
    always the part's text."""

    def __init__(self, data: Dict[str, Any], part: Part) -> None:
        self.data = data
        self.part = part
        self.pieces: List[str] = []
        self.section: Any = None

    @property
    def is_custom(self) -> bool:
        """Whether it is a custom tool's call."""
        return self.data["type"] == "custom_tool_call"

    def missing(self, text: str) -> str:
        """What `text`, the whole of it, has beyond the pieces; "" when it contradicts them, for those are sent."""
        sent = "".join(self.pieces)
        return text[len(sent):] if text.startswith(sent) else ""


class ResponsesReader(Reader):
    """response.* events → events. Items are told apart by `output_index`, where that is missing by id, else the last
    one to begin is meant. A part begins with its first text, so that items without any stay unseen; a call at once."""

    seals_late = False      # the host may give `encrypted_content` in the terminal event only

    def __init__(self, stamp: Stamp) -> None:
        super().__init__()
        self._stamp = stamp
        self._started = False
        self._refused = False
        self._count = 0
        self._items: Dict[Any, OutputItem] = {}
        self._keys: Dict[Any, Any] = {}
        self._last: Any = None
        self._unsealed: Dict[Any, Dict[str, Any]] = {}
        self._call_ids: set[str] = set()

    def on_event(self, name: str, text: str) -> Iterator[Event]:
        """Dispatches to a method by event type; unknown ones are skipped."""
        if text.strip() == "[DONE]":
            return
        data = loads(text)
        handler = self.handlers.get(data.get("type") or name)
        if handler is None and data.get("error") and not data.get("type"):
            handler = ResponsesReader._error
        if handler:
            yield from handler(self, data)

    def whole(self, body: Dict[str, Any]) -> Iterator[Event]:
        """A response: the same as its terminal event, and nothing before it."""
        if not isinstance(body.get("output"), list):
            if body.get("error"):
                raise responses_error(body["error"], self._stamp.created)
            raise UpstreamProtocolError("the provider's answer has no output")
        yield from self._terminal({"type": "response.completed", "response": body})

    def finish(self) -> Iterator[Event]:
        """The end of the stream before the terminal event is a cut, however clean."""
        raise UpstreamProtocolError("the provider's stream ended before its terminal event")
        yield

    def _start(self, response: Dict[str, Any]) -> Iterator[Event]:
        if not self._started:
            self._started = True
            yield Start(response.get("id") or "", response.get("model") or "")

    def _created(self, data: Dict[str, Any]) -> Iterator[Event]:
        yield from self._start(as_dict(data.get("response")))

    def _key(self, data: Dict[str, Any]) -> Any:
        index = data.get("output_index")
        if index is not None:
            return index
        return self._keys.get(data.get("item_id") or as_dict(data.get("item")).get("id"), self._last)

    def _item_added(self, data: Dict[str, Any]) -> Iterator[Event]:
        index = data.get("output_index")
        yield from self._open(f"item {self._count}" if index is None else index, data["item"])

    def _open(self, key: Any, item: Dict[str, Any]) -> Iterator[Event]:
        if key in self._items or key in self._parts:
            raise UpstreamProtocolError("the provider began two output items in the same place")
        yield from self._start({})
        self._count += 1
        self._last = key
        if item.get("id"):
            self._keys[item["id"]] = key
        maker = self._PARTS.get(item["type"])
        if maker is None:                       # an item of a kind that other clients have no word for
            return
        self._items[key] = opened = OutputItem(item, maker(self, item))
        if isinstance(opened.part, ToolCall):
            yield self._parts.start(key, opened.part)

    def _call(self, item: Dict[str, Any]) -> Part:
        """The item's call_id, as clients can send it back; made different when it was used before. The item's own id
        stays out: nothing is stored that it could name."""
        wanted = fit_id(item.get("call_id") or item.get("id") or f"call_{self._stamp.id}", RESPONSES_LIMIT)
        fresh = wanted
        while fresh in self._call_ids:
            fresh = fit_id(f"{wanted}_{len(self._call_ids)}", RESPONSES_LIMIT)
        self._call_ids.add(fresh)
        return ToolCall(fresh, item["name"])

    _PARTS: Mapping[str, Callable[[Any, Dict[str, Any]], Part]] = {
        "reasoning": lambda self, item: Thinking(maker=OpenAIResponses.name), "message": lambda self, item: Text(),
        "function_call": _call, "custom_tool_call": _call}

    def _write(self, key: Any, text: str) -> Iterator[Event]:
        item = self._items.get(key)
        if item is None or not text:
            return
        if key not in self._parts:
            yield self._parts.start(key, item.part)
        if item.is_custom:                      # free text travels as {"input": text}
            opening = "" if item.pieces else '{"input":"'
            yield self._parts.delta(key, opening + json_text(text)[1:-1])
        else:
            yield self._parts.delta(key, text)
        item.pieces.append(text)

    def _delta(self, data: Dict[str, Any]) -> Iterator[Event]:
        yield from self._write(self._key(data), data["delta"])

    def _refusal_delta(self, data: Dict[str, Any]) -> Iterator[Event]:
        self._refused = True
        yield from self._delta(data)

    def _reasoning_delta(self, data: Dict[str, Any]) -> Iterator[Event]:
        """A section of a summary, or of the reasoning itself, is set apart from the one before by a blank line."""
        key, section = self._key(data), (data.get("summary_index"), data.get("content_index"))
        item = self._items.get(key)
        if item is None or not data["delta"]:
            return
        gap = "\n\n" if item.pieces and section != item.section else ""
        item.section = section
        yield from self._write(key, gap + data["delta"])

    def _call_done(self, data: Dict[str, Any]) -> Iterator[Event]:
        key = self._key(data)
        if key in self._items:
            yield from self._write(key, self._items[key].missing(item_text({**self._items[key].data, **data})))

    def _item_done(self, data: Dict[str, Any]) -> Iterator[Event]:
        key, item = self._key(data), data["item"]
        if key not in self._items:
            key = f"item {self._count}" if key is None else key
            yield from self._open(key, item)    # its beginning was left out
        yield from self._close(key, item)

    def _close(self, key: Any, item: Dict[str, Any]) -> Iterator[Event]:
        """Ends an item, by the whole of it."""
        if key not in self._items:
            return
        opened = self._items[key]
        yield from self._write(key, opened.missing(item_text({**item, "type": opened.data["type"]})))
        del self._items[key]
        if isinstance(opened.part, Thinking):
            yield from self._close_reasoning(key, item)
            return
        if opened.is_custom:
            yield self._parts.delta(key, '"}' if opened.pieces else '{"input":""}')
        self._refused = self._refused or has_refusal(item)
        if key in self._parts:
            yield self._parts.end(key)

    def _close_reasoning(self, key: Any, item: Dict[str, Any]) -> Iterator[Event]:
        """Reasoning ends with its seal. Without one that is still to come, it waits; where all of it is sealed, there
        is only the seal."""
        signature = seal_reasoning(item)
        if signature is None and self.seals_late:
            self._unsealed[key] = item
            if key not in self._parts:          # keeps its place before what follows it
                yield self._parts.start(key, Thinking(maker=OpenAIResponses.name))
        elif key in self._parts:
            yield self._parts.end(key, signature)
        elif signature:
            yield self._parts.start(key, Thinking("", signature, True, OpenAIResponses.name))
            yield self._parts.end(key)

    def _terminal(self, data: Dict[str, Any]) -> Iterator[Event]:
        response = as_dict(data.get("response"))
        status = response.get("status")
        if status not in ("completed", "incomplete", "failed", "cancelled"):
            status = "incomplete" if data.get("type") == "response.incomplete" else "completed"
        if status in ("failed", "cancelled"):
            yield from self._failed(data)
        yield from self._start(response)
        output = [item for item in response.get("output") or () if isinstance(item, dict)]
        if not self._count:                     # a host that sends the whole answer at once
            for key, item in enumerate(output):
                yield from self._open(key, item)
                yield from self._close(key, item)
        yield from self._close_all(output, status)
        reason = as_dict(response.get("incomplete_details")).get("reason")
        stop = RESPONSES_CUT.get(reason, "length") if status == "incomplete" else "refusal" if self._refused else "stop"
        yield Done(stop, read_responses_usage(as_dict(response.get("usage"))))

    def _close_all(self, output: Sequence[Dict[str, Any]], status: str) -> Iterator[Event]:
        """Ends what is open, with what the terminal event has of it."""
        final = {item["id"]: item for item in output if item.get("id")}
        for key, item in list(self._items.items()):
            whole = final.get(item.data.get("id"))
            if whole is None and isinstance(item.part, ToolCall) and status == "completed":
                raise UpstreamProtocolError("the provider's answer ended inside a tool call")
            yield from self._close(key, whole or {})    # the beginning of an item may hold a part of its seal: not used
        for key, reasoning in self._unsealed.items():
            yield self._parts.end(key, seal_reasoning({**reasoning, **final.get(reasoning.get("id"), {})}))

    def _failed(self, data: Dict[str, Any]) -> Iterator[Event]:
        response = as_dict(data.get("response"))
        fallback = {"message": f"the provider's answer ended as {response.get('status') or 'failed'}"}
        raise responses_error(response.get("error") or fallback, self._stamp.created)
        yield

    def _error(self, data: Dict[str, Any]) -> Iterator[Event]:
        raise responses_error(data.get("error") or data, self._stamp.created)
        yield

    handlers: Mapping[str, Callable[..., Iterator[Event]]] = {
        "response.created": _created, "response.in_progress": _created, "response.queued": _created,
        "response.output_item.added": _item_added, "response.output_item.done": _item_done,
        "response.output_text.delta": _delta, "response.refusal.delta": _refusal_delta,
        "response.reasoning_summary_text.delta": _reasoning_delta, "response.reasoning_text.delta": _reasoning_delta,
        "response.reasoning.delta": _reasoning_delta,           # Open Responses' name for the one above
        "response.function_call_arguments.delta": _delta, "response.function_call_arguments.done": _call_done,
        "response.custom_tool_call_input.delta": _delta, "response.custom_tool_call_input.done": _call_done,
        "response.completed": _terminal, "response.incomplete": _terminal, "response.done": _terminal,
        "response.failed": _failed, "response.cancelled": _failed, "error": _error}


def item_text(item: Mapping[str, Any]) -> str:
    """The whole text of an output item: its visible text, its reasoning or the arguments of its call."""
    if item["type"] == "function_call":
        arguments = item.get("arguments") or ""
        return json_text(arguments) if isinstance(arguments, dict) else arguments
    if item["type"] == "custom_tool_call":
        return item.get("input") or ""
    content = [part.get("text") or part.get("refusal") or "" for part in item.get("content") or ()]
    if item["type"] != "reasoning":
        return "".join(content)
    summary = [part.get("text") or "" for part in item.get("summary") or ()]
    return "\n\n".join(text for text in summary if text) or "\n\n".join(text for text in content if text)


def has_refusal(item: Mapping[str, Any]) -> bool:
    """Whether a message says no."""
    return any(as_dict(part).get("type") == "refusal" for part in item.get("content") or ())


def seal_reasoning(item: Mapping[str, Any]) -> Optional[str]:
    """The signature of a reasoning item: its JSON text, whole. None for one that cannot be given back, since it neither
    has its content nor is it stored."""
    return dumps(item) if item.get("encrypted_content") or item.get("content") else None


def read_responses_usage(usage: Dict[str, Any]) -> Usage:
    """The Responses API's usage: input_tokens includes what the cache gave and took."""
    details, output = as_dict(usage.get("input_tokens_details")), as_dict(usage.get("output_tokens_details"))
    cached, written = token_count(details.get("cached_tokens")), token_count(details.get("cache_write_tokens"))
    return Usage(max(0, token_count(usage.get("input_tokens")) - cached - written),
                 token_count(usage.get("output_tokens")), cached, written, token_count(output.get("reasoning_tokens")))


# The codes of errors that come without a status, beside those of `STATUS_BY_KIND`.
RESPONSES_STATUS = {**STATUS_BY_KIND, "context_length_exceeded": 400, "slow_down": 503, "usage_limit_reached": 402,
                    "usage_not_included": 402, "invalid_api_key": 401, "model_not_found": 404}
_REQUEST_FAULT = re.compile(r"invalid|image|_policy|unsupported")
_DELAY = re.compile(r"try again in (?:(\d+)h)?(?:(\d+)m(?!s))?(?:(\d+(?:\.\d+)?)\s*(ms|s))?", re.IGNORECASE)


def responses_error(error: Any, now: float) -> GatewayError:
    """The error that the `error` of a failed response, or an error event, means; `now` in epoch seconds."""
    quota = quota_error(error, now)
    if quota:
        return quota
    message, kind, code = error_fields(dumps({"error": error}).encode("ascii"))
    status = RESPONSES_STATUS.get(code) or RESPONSES_STATUS.get(kind)
    if status is None:
        status = 400 if _REQUEST_FAULT.search(code) else 500
    return upstream_error(status, message or "the provider reported an error", kind, code, read_delay(message))


def read_delay(message: str) -> Optional[float]:
    """Seconds of the pause that a rate limit's text names: "Please try again in 2.5s", 300ms, 1m30s; None if it names
    none."""
    match = _DELAY.search(message)
    if not match or not any(match.groups()):
        return None
    hours, minutes, count, unit = match.groups()
    seconds = float(count or 0) / (1000 if unit and unit.lower() == "ms" else 1)
    return int(hours or 0) * 3600 + int(minutes or 0) * 60 + seconds


def quota_error(error: Any, now: float) -> Optional[QuotaExceeded]:
    """A subscription's limit, told so that one can act on it; None for any other error. `now` is in epoch seconds, as
    is the error's `resets_at`."""
    error = as_dict(error)
    code = next((error[name] for name in ("code", "type") if str(error.get(name)) in QUOTA_MESSAGES), None)
    if code is None:
        return None
    resets_at, wait_s = seconds(error.get("resets_at")), seconds(error.get("resets_in_seconds"))
    if resets_at is not None:
        wait_s = max(0.0, resets_at - now)
    plan = f" ({error['plan_type']} plan)" if isinstance(error.get("plan_type"), str) else ""
    when = "" if wait_s is None else f"; it resets in about {math.ceil(wait_s / 60)} min"
    return QuotaExceeded(QUOTA_MESSAGES[code] + plan + when, retry_after=wait_s)


def seconds(value: Any) -> Optional[float]:
    """A time or duration in seconds as a float; None for anything else."""
    return float(value) if _KINDS["a number"](value) and 0 <= value < 1e12 else None


QUOTA_MESSAGES = {"usage_limit_reached": "the usage limit of the ChatGPT subscription is reached",
                  "usage_not_included": "the ChatGPT subscription does not include this model"}


# --- azure-openai-responses -------------------------------------------------------------------------------------------

AZURE_VERSION = "v1"
AZURE_HOSTS = (".openai.azure.com", ".cognitiveservices.azure.com", ".ai.azure.com")
AZURE_PATHS = ("", "/openai", "/openai/v1/responses")       # as the portal shows them; all mean /openai/v1


class AzureResponses(OpenAIResponses):
    """Azure OpenAI: POST {base}/responses?api-version=…, key in `api-key`, deployments in place of models. The
    credential's parts may be base_url, resource, api_version and deployment_map ("model=deployment,…")."""

    name = "azure-openai-responses"
    auth = "api-key"
    takes_strict = True

    def url(self, model: Model, credential: Credential, path: str = "/responses") -> str:
        """See `OpenAIResponses.url`. Raises `Unauthorized`, code no_credentials, when no address is configured."""
        version = credential.parts.get("api_version", "").strip() or AZURE_VERSION
        return (join_url(azure_base_url(credential.parts, model.base_url), path) + "?api-version="
                + urllib.parse.quote(version, safe=""))

    def wire_model(self, model: Model, credential: Credential) -> str:
        """The deployment of the model; its id where none is named."""
        return parse_deployments(credential.parts.get("deployment_map", "")).get(model.id, model.id)

    def reader(self, model: Model, stamp: Stamp) -> Reader:
        """See `UpstreamProtocol.reader`."""
        return AzureReader(stamp)


class AzureReader(ResponsesReader):
    """Azure gives the seal of reasoning in the last event at times."""

    seals_late = True


def azure_base_url(parts: Mapping[str, str], fallback: str = "") -> str:
    """The base URL by address, else by resource name, else `fallback`; a bare Azure host gets the path of its API.
    Raises `Unauthorized`, code no_credentials, when there is none or it is no URL."""
    resource = parts.get("resource", "").strip()
    base = (parts.get("base_url", "").strip() or (f"https://{resource}.openai.azure.com" if resource else "")
            or fallback)
    try:
        split = urllib.parse.urlsplit(base)
        host = split.hostname or ""
    except ValueError:
        host = ""
    if not host:
        raise Unauthorized("no usable address for Azure OpenAI: set AZURE_OPENAI_BASE_URL or "
                           "AZURE_OPENAI_RESOURCE_NAME", code="no_credentials", param="model")
    path = split.path.rstrip("/")
    if host.endswith(AZURE_HOSTS) and path in AZURE_PATHS:
        path = "/openai/v1"
    return f"{split.scheme}://{split.netloc}{path}"


def parse_deployments(text: str) -> Dict[str, str]:
    """"model=deployment, model=deployment" as a dict; malformed pairs are skipped."""
    pairs = (pair.partition("=") for pair in text.split(","))
    return {name.strip(): value.strip() for name, _, value in pairs if name.strip() and value.strip()}


# --- openai-codex-responses -------------------------------------------------------------------------------------------

CODEX_INSTRUCTIONS = "You are a helpful assistant."     # the field must be there and must not be empty
CODEX_CLAIM = "https://api.openai.com/auth"
CODEX_FIELDS = frozenset({                              # anything else is answered with 400
    "model", "store", "stream", "instructions", "input", "text", "include", "prompt_cache_key", "tool_choice",
    "parallel_tool_calls", "temperature", "service_tier", "tools", "reasoning"})


class CodexResponses(OpenAIResponses):
    """The ChatGPT subscription's backend: POST {base}/codex/responses, always streamed, never stored, the system text
    in `instructions`."""

    name = "openai-codex-responses"
    takes_limit = False
    takes_strict = True
    unset_strict = None

    def carries(self, model: Model) -> FrozenSet[str]:
        """What the backend takes."""
        return super().carries(model) - {"user", "top_p"}

    def url(self, model: Model, credential: Credential, path: str = "/responses") -> str:
        """See `OpenAIResponses.url`; the backend has this one path."""
        return codex_url(model.base_url)

    def headers(self, request: Request, model: Model, credential: Credential) -> Dict[str, str]:
        """Request headers. Raises `Unauthorized`, code no_credentials, for a token that names no account."""
        session = re.sub(r"[^\x21-\x7e]", "", session_key(request, model) or "")
        return {"originator": NAME, "openai-beta": "responses=experimental",
                **({"session-id": session, "x-client-request-id": session} if session else {}),
                **authorization(model, credential), "accept": "text/event-stream",
                "chatgpt-account-id": codex_account(credential.token)}

    def body(self, request: Request, model: Model, credential: Credential) -> Dict[str, Any]:
        """See `OpenAIResponses.body`."""
        system = "\n\n".join(text.text for text in request.system)
        if not request.messages:                # a system prompt alone: the backend needs input
            request, system = replace(request, messages=(Message("user", request.system),)), ""
        body = super().body(replace(request, system=(), stream=True), model, credential)
        body = {"tool_choice": "auto", "parallel_tool_calls": True, "include": [RESPONSES_SEAL], **body,
                "instructions": system or CODEX_INSTRUCTIONS}
        return {name: value for name, value in body.items() if name in CODEX_FIELDS}

    def adapt(self, request: Request, model: Model, credential: Credential) -> Tuple[Dict[str, Any], List[str]]:
        """See `OpenAIResponses.adapt`."""
        body, dropped = super().adapt(request, model, credential)
        if isinstance(body["input"], str):
            body["input"] = [{"role": "user", "content": body["input"]}]
        body["input"] = [{**item, "role": "developer"} if item.get("role") == "system" else item
                         for item in body["input"]]
        body = {"tool_choice": "auto", "parallel_tool_calls": True, "include": [RESPONSES_SEAL], **body,
                "instructions": body.get("instructions") or CODEX_INSTRUCTIONS, "stream": True}
        dropped += [name for name, value in body.items() if name not in CODEX_FIELDS and value is not None]
        return {name: value for name, value in body.items() if name in CODEX_FIELDS}, dropped

    def parse_error(self, status: int, headers: Mapping[str, str], body: bytes, now: float) -> GatewayError:
        """A used-up subscription is told in words; anything else as everywhere."""
        return quota_error(error_object(body), now) or super().parse_error(status, headers, body, now)


def codex_url(base: str) -> str:
    """The address of the backend, whether or not `base` already has the end of it."""
    base = base.rstrip("/")
    ending = next((end for end in ("/codex/responses", "/codex") if base.endswith(end)), "")
    return base + "/codex/responses"[len(ending):]


def codex_account(token: str) -> str:
    """The account that a ChatGPT access token (a JWT, whose seal is not ours to check) is for. Raises `Unauthorized`,
    code no_credentials, when it names none."""
    payload = (token.split(".") + ["", ""])[1]
    try:
        claims = as_dict(json.loads(base64.urlsafe_b64decode(payload + "=" * (-len(payload) % 4))))
    except (ValueError, RecursionError):
        claims = {}
    account = as_dict(claims.get(CODEX_CLAIM)).get("chatgpt_account_id")
    if not isinstance(account, str) or not account:
        raise Unauthorized("the ChatGPT token names no account; log in to openai-codex again (an API key is for "
                           "the provider openai)", code="no_credentials", param="model")
    return account


# --- GitHub Copilot ---------------------------------------------------------------------------------------------------


def copilot_headers(request: Request) -> Dict[str, str]:
    """What Copilot wants to know of each request: who began this turn, and whether there is something to look at."""
    is_user = bool(request.messages) and request.messages[-1].role == "user"
    headers = {"x-initiator": "user" if is_user else "agent", "openai-intent": "conversation-edits"}
    if any(isinstance(part, Image) for message in request.messages if message.role in ("user", "tool")
           for part in _flat_parts(message.parts)):
        headers["copilot-vision-request"] = "true"
    return headers


def copilot_base_url(token: str, enterprise_domain: str = "") -> str:
    """The base URL that a Copilot token (semicolon-separated fields) names as its proxy; else the enterprise's, else
    everybody's."""
    match = re.search(r"proxy-ep=([^;]+)", token)
    if match:
        return "https://" + re.sub(r"^proxy\.", "api.", match.group(1))
    host = f"copilot-api.{enterprise_domain}" if enterprise_domain else "api.individual.githubcopilot.com"
    return "https://" + host


# --- google-generative-ai ---------------------------------------------------------------------------------------------

GEMINI_STOP = {
    "STOP": "stop", "MAX_TOKENS": "length", "SAFETY": "refusal", "RECITATION": "refusal", "BLOCKLIST": "refusal",
    "PROHIBITED_CONTENT": "refusal", "SPII": "refusal", "MODEL_ARMOR": "refusal", "IMAGE_SAFETY": "refusal",
    "IMAGE_PROHIBITED_CONTENT": "refusal", "IMAGE_RECITATION": "refusal"}
GEMINI_FAILURES = frozenset({
    "FINISH_REASON_UNSPECIFIED", "OTHER", "LANGUAGE", "MALFORMED_FUNCTION_CALL", "UNEXPECTED_TOOL_CALL",
    "TOO_MANY_TOOL_CALLS", "MALFORMED_RESPONSE", "MISSING_THOUGHT_SIGNATURE", "IMAGE_OTHER", "NO_IMAGE", "ESCALATION",
    "PUP_LIMITED_DISABLED", "CONTINUATION"})
GEMINI_CHOICES = {"auto": "AUTO", "none": "NONE", "required": "ANY", "tool": "ANY"}
# models.json writes samplingParams with the names of Chat Completions
GEMINI_SAMPLING = {"top_p": "topP", "top_k": "topK", "max_tokens": "maxOutputTokens", "stop": "stopSequences",
                   "frequency_penalty": "frequencyPenalty", "presence_penalty": "presencePenalty"}
GEMINI_ID_LIMIT = 64
GEMINI_STOP_LIMIT = 5               # stopSequences, at most
# Gemini 3 refuses the first call of a model turn without its signature; this word, sent raw, switches the check off.
GEMINI_SENTINEL = "skip_thought_signature_validator"
GEMINI_OPENING = "…"                # a conversation must begin with the user, and empty text breaks Claude
GEMINI_IMAGE_NOTE = "(see attached image)"
GEMINI_MEDIA = {"png": "image/png", "jpg": "image/jpeg", "jpeg": "image/jpeg", "webp": "image/webp", "gif": "image/gif",
                "heic": "image/heic", "heif": "image/heif", "pdf": "application/pdf"}


class GeminiBudgets(NamedTuple):
    """How a model family takes its thinking budget, in tokens: what is next to off, the range, and by level."""

    off: int
    lowest: int
    highest: int
    by_level: Mapping[str, int]


_BUDGET_FAMILIES = (
    (re.compile(r"gemini-2\.5-pro"), GeminiBudgets(128, 128, 32768, {
        "minimal": 128, "low": 2048, "medium": 8192, "high": 32768})),
    (re.compile(r"gemini-2\.5-flash-lite"), GeminiBudgets(0, 512, 24576, {
        "minimal": 512, "low": 2048, "medium": 8192, "high": 24576})),
    (re.compile(r"gemini-2\.5-flash"), GeminiBudgets(0, 0, 24576, {
        "minimal": 128, "low": 2048, "medium": 8192, "high": 24576})),
)
_OTHER_BUDGETS = GeminiBudgets(0, 0, sys.maxsize, {})       # a level then is -1: as much as the model likes
_LEVEL_MODELS = re.compile(r"gemini-3(?:\.\d+)?-(?:pro|flash)|gemini-(?:[4-9]|\d\d)|"
                           r"gemini-(?:flash|flash-lite|pro)-latest$|gemma-?4")
# For models that the catalogue says nothing of.
_LEVEL_FAMILIES = (
    (re.compile(r"gemini-3-pro"), ("low", "high")),
    (re.compile(r"gemini-[\d.]+-flash-image|gemma-?4"), ("minimal", "high")),
    (re.compile(r"gemini-3\.\d+-pro|gemini-3\.[78]-flash|gemini-(?:[4-9]|\d\d)|gemini-pro-latest"),
     ("low", "medium", "high")),
    (re.compile(r""), ("minimal", "low", "medium", "high")),
)
_THINKERS = re.compile(r"gemini-2\.5-|gemini-(?:live-)?[3-9]|gemini-.*-latest$|gemma-?4")


def bare_id(model_id: str) -> str:
    """A Google model's id without collection or publisher: `models/gemini-x` is `gemini-x`."""
    return model_id.rpartition("/")[2]


def gemini_name(model_id: str) -> str:
    """The model as a resource of the API."""
    return model_id if model_id.startswith("tunedModels/") else "models/" + bare_id(model_id)


def gemini_url(model: Model, method: str) -> str:
    """Where a method of the model is."""
    return join_url(model.base_url, "/" + urllib.parse.quote(gemini_name(model.id), safe="/@:") + method)


def gemini_major(model_id: str) -> Optional[int]:
    """3 for gemini-3.1-pro and gemini-live-3-x; None for what has no number, or is not Gemini."""
    match = re.match(r"gemini(?:-live)?-(\d+)", bare_id(model_id))
    return int(match.group(1)) if match else None


def sends_call_ids(model_id: str) -> bool:
    """Whether functionCall and functionResponse carry ids: Gemini 2 matches them by name and order."""
    return (gemini_major(model_id) or 0) >= 3 or bare_id(model_id).startswith(("claude-", "gpt-oss-"))


def nests_images(model_id: str) -> bool:
    """Whether a functionResponse may hold images; Gemini 2 takes them only beside it."""
    return (gemini_major(model_id) or 3) >= 3


def checks_signatures(model_id: str) -> bool:
    """Whether the model refuses unsigned calls: Gemini 3 and later, which the names ending in -latest stand for."""
    return (gemini_major(model_id) or 0) >= 3 or bool(re.match(r"gemini-.*-latest$", bare_id(model_id)))


def read_signature(value: Any) -> Optional[str]:
    """A thought signature in the alphabet that Google sends; None for what is none. Google's own clients give it back
    in the URL-safe alphabet. The sentinel is of that alphabet too, but no base64, and stays as it is."""
    if not isinstance(value, str) or not value or value == GEMINI_SENTINEL:
        return value or None if isinstance(value, str) else None
    standard = value.replace("-", "+").replace("_", "/").rstrip("=")
    standard += "=" * (-len(standard) % 4)
    return standard if re.fullmatch(r"[A-Za-z0-9+/]+={0,2}", standard) else None


class GoogleGenerativeAI(UpstreamProtocol):
    """Google's Gemini API: POST {base}/models/{id}:streamGenerateContent?alt=sse or :generateContent.

    Compat flag `legacyParameters`: tools are declared in the older, strict schema dialect."""

    name = "google-generative-ai"

    def carries(self, model: Model) -> FrozenSet[str]:
        """What generationConfig has a field for; reasoning unless the model is known not to, or not known to."""
        fields = {"temperature", "top_p", "top_k", "stop", "seed", "frequency_penalty", "presence_penalty", "output",
                  "json_object"}
        if model.reasoning or (model.reasoning is None and _THINKERS.match(bare_id(model.id))):
            fields.add("reasoning")
        if not model.flag("supportsTemperature", True):
            fields -= {"temperature", "top_p", "top_k"}
        return frozenset(fields)

    def replays(self, part: Thinking, model: Model) -> bool:
        """What came by this protocol, signed or not."""
        return part.maker == self.name

    def fit(self, request: Request, model: Model) -> Tuple[Request, List[str]]:
        """Keeps as many stop sequences as the API takes."""
        if len(request.stop) <= GEMINI_STOP_LIMIT:
            return request, []
        return replace(request, stop=request.stop[:GEMINI_STOP_LIMIT]), ["stop"]

    def build(self, request: Request, model: Model, credential: Credential) -> Call:
        """See `UpstreamProtocol.build`."""
        url = gemini_url(model, self.method(request))
        return Call("POST", url, self.headers(model, credential), dumps(self.body(request, model)).encode("ascii"))

    def method(self, request: Request) -> str:
        """The end of the URL. Without alt=sse a stream would be a JSON array that comes bit by bit."""
        return ":streamGenerateContent?alt=sse" if request.stream else ":generateContent"

    def headers(self, model: Model, credential: Credential) -> Dict[str, str]:
        """Request headers: a key in x-goog-api-key or a token as bearer, never both."""
        scheme = model.flag("auth") or ("bearer" if credential.kind == "oauth" else "x-goog-api-key")
        return authorization(model, credential, scheme)

    def body(self, request: Request, model: Model) -> Dict[str, Any]:
        """The GenerateContentRequest."""
        contents = self.contents(request.messages, model)
        system: List[Dict[str, Any]] = [{"text": text.text} for text in request.system]
        if not contents:                        # a system prompt alone: the API needs a user turn
            contents, system = [{"role": "user", "parts": system}], []
        return present(
            contents=contents, systemInstruction={"parts": system} if system else None,
            tools=self.tools(request.tools, model), toolConfig=self.tool_config(request, model),
            generationConfig=self.config(request, model) or None)

    def contents(self, messages: Iterable[Message], model: Model) -> List[Dict[str, Any]]:
        """Turns that begin with the user. Neighbours of one role are joined, but for tool results, which stand alone:
        the API counts them against the calls before them."""
        out: List[Dict[str, Any]] = []
        names: Dict[str, str] = {}              # of calls by id; in order, since clients use ids again
        for message in messages:
            names.update((part.id, part.name) for part in message.parts if isinstance(part, ToolCall))
            for content in self._contents(message, names, model):
                if out and _may_join(out[-1], content):
                    out[-1]["parts"].extend(content["parts"])
                elif content["parts"]:
                    out.append(content)
        if out and out[0]["role"] == "model":
            out.insert(0, {"role": "user", "parts": [{"text": GEMINI_OPENING}]})
        if checks_signatures(model.id):
            mark_unsigned(out)
        return out

    def _contents(self, message: Message, names: Mapping[str, str], model: Model) -> List[Dict[str, Any]]:
        if message.role == "tool":
            results = [part for part in message.parts if isinstance(part, ToolResult)]
            shown = [] if nests_images(model.id) else [self.part(part, model) for result in results
                                                       for part in pictures(result)]
            after = [{"text": "Images from the tool results above:"}, *shown] if shown else []
            answers = [self._result(result, names, model) for result in results]
            return [{"role": "user", "parts": answers}, {"role": "user", "parts": after}]
        role = "model" if message.role == "assistant" else "user"
        parts = [self.part(part, model) for part in message.parts]
        return [{"role": role, "parts": [part for part in parts if part]}]

    def part(self, part: Part, model: Model) -> Dict[str, Any]:
        """One part as Gemini has it; {} for what is not to be sent."""
        if isinstance(part, Thinking):
            return self._thought(part, model)
        if isinstance(part, ToolCall):
            signature = read_signature(part.signature) if part.maker == self.name else None
            return present(functionCall=self._call(part, model), thoughtSignature=signature)
        if isinstance(part, (Image, Document)):
            return gemini_media(part)
        return {"text": part.text} if isinstance(part, Text) and part.text else {}

    def _thought(self, part: Thinking, model: Model) -> Dict[str, Any]:
        signature = read_signature(part.signature)
        if part.redacted:                       # a signature that came with text, see `GeminiReader`
            return {"text": "", "thoughtSignature": signature} if signature else {}
        if not part.text and not signature:
            return {}
        return present(text=part.text, thought=True, thoughtSignature=signature)

    def _call(self, call: ToolCall, model: Model) -> Dict[str, Any]:
        arguments = repair_json_object(call.arguments)
        if arguments is None:
            arguments = {"malformed_arguments": call.arguments}
        return present(id=self._id(call.id, model), name=call.name, args=arguments)

    def _id(self, call_id: str, model: Model) -> Optional[str]:
        return fit_id(call_id, GEMINI_ID_LIMIT) if sends_call_ids(model.id) else None

    def _result(self, result: ToolResult, names: Mapping[str, str], model: Model) -> Dict[str, Any]:
        shown = pictures(result)
        text = "\n".join(part.text for part in result.parts if isinstance(part, Text))
        text = text or (GEMINI_IMAGE_NOTE if shown else "")
        nested = [gemini_media(part) for part in shown] if nests_images(model.id) else []
        return {"functionResponse": present(
            id=self._id(result.call_id, model), name=names.get(result.call_id, result.call_id),
            response={"error" if result.is_error else "output": text}, parts=nested or None)}

    def is_strict(self, model: Model) -> bool:
        """Whether tools are declared in the strict dialect."""
        return bool(model.flag("legacyParameters"))

    def tools(self, tools: Sequence[Tool], model: Model) -> Optional[List[Dict[str, Any]]]:
        """One Tool with all declarations."""
        declare = self._declare_strictly if self.is_strict(model) else self._declare
        return [{"functionDeclarations": [declare(tool) for tool in tools]}] if tools else None

    def _declare(self, tool: Tool) -> Dict[str, Any]:
        return present(name=tool.name, description=tool.description, parametersJsonSchema=const_to_enum(tool.schema))

    def _declare_strictly(self, tool: Tool) -> Dict[str, Any]:
        schema = clean_schema(tool.schema)      # without properties it is refused, and not needed
        return present(name=tool.name, description=tool.description,
                       parameters=schema if schema.get("properties") else None)

    def tool_config(self, request: Request, model: Model) -> Optional[Dict[str, Any]]:
        """Which calls are allowed. Strict tools ask for arguments that are checked, which Gemini 3 can."""
        choice = request.tool_choice
        if not request.tools:
            return None
        if choice is None or choice.kind == "auto":
            if any(tool.strict for tool in request.tools) and (gemini_major(model.id) or 0) >= 3:
                return {"functionCallingConfig": {"mode": "VALIDATED"}}
        if choice is None:
            return None
        return {"functionCallingConfig": present(mode=GEMINI_CHOICES[choice.kind],
                                                 allowedFunctionNames=[choice.name] if choice.name else None)}

    def config(self, request: Request, model: Model) -> Dict[str, Any]:
        """The generationConfig. maxOutputTokens counts thinking too, so that room for it comes on top of what was asked
        for the answer, within the model's limit."""
        thinking, room = self.thinking(request, model)
        limit = request.max_tokens and min(request.max_tokens + room, model.max_tokens or sys.maxsize)
        output = request.output
        schema = output.schema if output else None
        config = present(
            maxOutputTokens=limit, temperature=request.temperature, topP=request.top_p, topK=request.top_k,
            stopSequences=list(request.stop) or None, seed=request.seed, frequencyPenalty=request.frequency_penalty,
            presencePenalty=request.presence_penalty, responseMimeType="application/json" if output else None,
            responseJsonSchema=None if schema is None else const_to_enum(schema), thinkingConfig=thinking)
        return {**config, **{GEMINI_SAMPLING.get(name, name): value for name, value in model.sampling.items()}}

    def thinking(self, request: Request, model: Model) -> Tuple[Optional[Dict[str, Any]], int]:
        """(thinkingConfig, tokens that thinking may take). Level and budget together would be refused."""
        if request.reasoning is None:
            return None, 0
        if _LEVEL_MODELS.match(bare_id(model.id)):
            return thinking_level(request.reasoning, model)
        return thinking_budget(request.reasoning, model)

    def reader(self, model: Model, stamp: Stamp) -> Reader:
        """See `UpstreamProtocol.reader`."""
        return GeminiReader(self.name, stamp)

    def parse_error(self, status: int, headers: Mapping[str, str], body: bytes, now: float) -> GatewayError:
        """See `UpstreamProtocol.parse_error`."""
        return google_error(status, headers, body, now)


def _may_join(before: Mapping[str, Any], after: Mapping[str, Any]) -> bool:
    # the last part of what has been joined is enough: it was let in by the same rule
    kinds = [any("functionResponse" in part for part in parts) for parts in (before["parts"][-1:], after["parts"])]
    return before["role"] == after["role"] and (kinds[0] == kinds[1] or not after["parts"])


def pictures(result: ToolResult) -> List[Union[Image, Document]]:
    """What a tool gave back that is not text."""
    return [part for part in result.parts if isinstance(part, (Image, Document))]


def gemini_media(part: Union[Image, Document]) -> Dict[str, Any]:
    """A picture or file as inlineData, or by its address as fileData."""
    if part.url is None:
        return {"inlineData": {"mimeType": part.media_type, "data": part.data}}
    ending = urllib.parse.urlsplit(part.url).path.rpartition(".")[2].lower()
    fallback = "image/jpeg" if isinstance(part, Image) else "application/pdf"
    return {"fileData": {"mimeType": part.media_type or GEMINI_MEDIA.get(ending, fallback), "fileUri": part.url}}


def mark_unsigned(contents: Sequence[Dict[str, Any]]) -> None:
    """Puts the sentinel on the first call of each model turn behind the user's last words, where its signature is
    missing: the client lost it, or another model made the call. Siblings stay bare, as Gemini itself leaves them."""
    said = [place for place, content in enumerate(contents) if content["role"] == "user"
            and any("text" in part for part in content["parts"])
            and not any("functionResponse" in part for part in content["parts"])]
    for content in contents[said[-1] if said else 0:]:
        first = next((part for part in content["parts"] if "functionCall" in part), None)
        if first is not None:
            first.setdefault("thoughtSignature", GEMINI_SENTINEL)


def nearest_level(level: str, allowed: Sequence[str]) -> str:
    """The allowed level next to `level`, searched upward first."""
    place = max(1, LEVELS.index(level))
    order = LEVELS[place:] + tuple(reversed(LEVELS[1:place]))
    return next(candidate for candidate in order if candidate in allowed)


def gemini_levels(model: Model) -> List[str]:
    """The thinking levels that a model has: by the catalogue, else by its family."""
    known = [level for level in LEVELS[1:] if fit_level(level, model) == level] if model.thinking_levels else []
    return known or list(next(levels for family, levels in _LEVEL_FAMILIES if family.match(bare_id(model.id))))


def thinking_level(reasoning: Reasoning, model: Model) -> Tuple[Dict[str, Any], int]:
    """(thinkingConfig, room in tokens) of a model that takes a level. It cannot be turned off: then it is the lowest,
    and the thoughts stay unseen."""
    level = nearest_level(reasoning.level, gemini_levels(model))
    config: Dict[str, Any] = {"thinkingLevel": (model.thinking_levels.get(level) or level).upper()}
    if reasoning.level == "off":
        return config, 0
    return {"includeThoughts": True, **config}, reasoning.budget or LEVEL_BUDGETS[level]


def thinking_budget(reasoning: Reasoning, model: Model) -> Tuple[Dict[str, Any], int]:
    """(thinkingConfig, room in tokens) of a model that takes a budget."""
    family = next((budgets for ids, budgets in _BUDGET_FAMILIES if ids.match(bare_id(model.id))), _OTHER_BUDGETS)
    if reasoning.level == "off":
        return {"thinkingBudget": family.off}, 0
    level = nearest_level(reasoning.level, ("minimal", "low", "medium", "high"))
    budget = reasoning.budget or family.by_level.get(level, -1)
    if budget > 0:
        budget = min(max(budget, family.lowest), family.highest)
    return {"includeThoughts": True, "thinkingBudget": budget}, budget if budget > 0 else LEVEL_BUDGETS[level]


# a line that no event stream has: a JSON body, sent in place of events when the answer breaks
_BARE_JSON = re.compile(rb"^[ \t]*[\[{]", re.MULTILINE)
_EVENT_LINE = re.compile(rb"(?:data|event|id|retry)?:|\s*\Z")


class GeminiReader(Reader):
    """GenerateContentResponse chunks → events. `maker` names the protocol that signed thinking goes back to.

    A signature may stand on any part. On a thought it is that thought's; on a call the call's; on text, which has no
    place for it, it becomes sealed thinking behind the text, and goes back as an empty signed text."""

    def __init__(self, maker: str, stamp: Stamp) -> None:
        super().__init__()
        self._maker = maker
        self._stamp = stamp
        self._started = False
        self._answered = False
        self._stop: Optional[str] = None
        self._detail: Optional[str] = None
        self._usage = Usage()
        self._signatures: Dict[type, str] = {}
        self._call_ids: set[str] = set()
        self._bare = b""

    def _read(self, block: bytes) -> Iterator[Event]:
        yield from super()._read(block)
        if self._bare or _BARE_JSON.search(block):
            lines = [line for line in block.splitlines() if not _EVENT_LINE.match(line)]
            self._bare = (self._bare + b"\n".join(lines))[:MAX_ERROR_BYTES]

    def on_event(self, name: str, text: str) -> Iterator[Event]:
        """One chunk. [DONE] comes from hosts that mix up protocols."""
        if text.strip() != "[DONE]":
            yield from self.on_chunk(loads(text))

    def whole(self, body: Dict[str, Any]) -> Iterator[Event]:
        """A GenerateContentResponse: the same as one chunk."""
        yield from self.on_chunk(body)
        yield from self.finish()

    def finish(self) -> Iterator[Event]:
        """The end without a finish reason is a cut; an answer of thoughts alone counts as empty."""
        if self._bare:
            raise google_error(0, {}, self._bare, 0.0)
        if self._stop is None and self._started:
            raise UpstreamProtocolError("the provider's stream ended without a finish reason")
        if self._stop in (None, "stop") and not self._answered:
            raise EmptyAnswer("the provider's answer is empty")
        yield from self._close()
        yield Done(self._stop or "stop", self._usage, self._detail)

    def on_chunk(self, chunk: Any) -> Iterator[Event]:
        """The events that one chunk amounts to."""
        if isinstance(chunk, list) and chunk:
            chunk = chunk[0]
        if not isinstance(chunk, dict):
            raise UpstreamProtocolError("the provider sent an event that is not an object")
        if chunk.get("error"):
            raise google_error(0, {}, dumps(chunk).encode("ascii"), 0.0)
        if not self._started and ("candidates" in chunk or "promptFeedback" in chunk):
            self._started = True
            yield Start(chunk.get("responseId") or "", chunk.get("modelVersion") or "")
        if isinstance(chunk.get("usageMetadata"), dict):
            self._usage = read_gemini_usage(chunk["usageMetadata"])
        candidates = chunk.get("candidates") or [{}]
        for part in as_dict(candidates[0].get("content")).get("parts") or ():
            yield from self._part(part)
        self._note_stop(candidates[0], as_dict(chunk.get("promptFeedback")))

    def _part(self, part: Dict[str, Any]) -> Iterator[Event]:
        signature = read_signature(part.get("thoughtSignature"))
        if part.get("functionCall") is not None:
            yield from self._call(part["functionCall"], signature)
        elif isinstance(part.get("text"), str):
            yield from self._text(Thinking if part.get("thought") else Text, part["text"], signature)
        elif signature:
            self._signatures[Text] = signature
        else:                                   # code that Google ran, a picture: our clients have no words for it
            self._answered = True

    def _text(self, kind: type, text: str, signature: Optional[str]) -> Iterator[Event]:
        if kind not in self._parts and (text or kind is Thinking):
            yield from self._close()
            yield self._parts.start(kind, Thinking(maker=self._maker) if kind is Thinking else Text())
        if text:
            yield self._parts.delta(kind, text)
            self._answered = self._answered or kind is Text
        if signature:                           # a later piece without one does not take it back
            self._signatures[kind] = signature

    def _call(self, call: Dict[str, Any], signature: Optional[str]) -> Iterator[Event]:
        yield from self._close()
        self._answered = True
        call_id = self._fresh_id(call.get("id") or "")
        maker = self._maker if signature else ""
        yield self._parts.start(call_id, ToolCall(call_id, call["name"], "", signature, maker))
        yield self._parts.delta(call_id, json_text(call.get("args") or {}))
        yield self._parts.end(call_id)

    def _fresh_id(self, call_id: str) -> str:
        """The call's own id, made up when it is missing and made different when it was used before."""
        base = call_id or f"call_{self._stamp.id}"
        fresh = base if call_id else f"{base}_{len(self._call_ids)}"
        while fresh in self._call_ids:
            fresh = f"{fresh}_{len(self._call_ids)}"
        self._call_ids.add(fresh)
        return fresh

    def _close(self) -> Iterator[Event]:
        for kind in (Thinking, Text):
            if kind in self._parts:
                yield self._parts.end(kind, self._signatures.pop(kind, None) if kind is Thinking else None)
        signature = self._signatures.pop(Text, None)
        if signature:
            yield self._parts.start("seal", Thinking("", signature, True, self._maker))
            yield self._parts.end("seal")

    def _note_stop(self, candidate: Mapping[str, Any], feedback: Mapping[str, Any]) -> None:
        reason, blocked = candidate.get("finishReason"), feedback.get("blockReason")
        if reason in GEMINI_FAILURES:
            said = candidate.get("finishMessage")
            raise UpstreamError(f"the provider stopped: {reason}" + (f" ({said})" if said else ""), code=reason.lower())
        if reason and reason not in GEMINI_STOP:
            raise UpstreamProtocolError(f"the provider stopped for a reason that is not known here: {reason}")
        if reason:
            self._stop = GEMINI_STOP[reason]
            if self._stop == "refusal":
                self._detail = candidate.get("finishMessage") or f"The provider's filter ended the answer: {reason}"
        elif blocked:
            self._stop = "refusal"
            self._detail = feedback.get("blockReasonMessage") or f"The provider blocked the prompt: {blocked}"


def read_gemini_usage(usage: Mapping[str, Any]) -> Usage:
    """Google's usage: promptTokenCount includes what was cached, candidatesTokenCount leaves out thoughts."""
    count = {name: token_count(value) for name, value in usage.items()}
    cached, thoughts = count.get("cachedContentTokenCount", 0), count.get("thoughtsTokenCount", 0)
    prompt = count.get("promptTokenCount", 0) + count.get("toolUsePromptTokenCount", 0)
    return Usage(max(0, prompt - cached), count.get("candidatesTokenCount", 0) + thoughts, cached, 0, thoughts)


# google.rpc.Code by name, for errors inside a stream, which have no HTTP status
GOOGLE_STATUS = {
    "INVALID_ARGUMENT": 400, "FAILED_PRECONDITION": 400, "OUT_OF_RANGE": 400, "UNAUTHENTICATED": 401,
    "PERMISSION_DENIED": 403, "NOT_FOUND": 404, "ALREADY_EXISTS": 409, "ABORTED": 409, "RESOURCE_EXHAUSTED": 429,
    "CANCELLED": 500, "UNKNOWN": 500, "INTERNAL": 500, "DATA_LOSS": 500, "UNIMPLEMENTED": 501, "UNAVAILABLE": 503,
    "DEADLINE_EXCEEDED": 504}
GOOGLE_SPENT = frozenset({"QUOTA_EXHAUSTED", "INSUFFICIENT_G1_CREDITS_BALANCE"})
LONGEST_PAUSE_S = 300.0             # a longer wait is a quota that is used up, not a rate
MINUTE_QUOTA_S = 60.0
_BAD_KEY = re.compile(r"API key (?:not valid|expired|not found)", re.IGNORECASE)
_LONG_QUOTA = re.compile(r"PerDay|Daily", re.IGNORECASE)
_DURATION_UNITS = {"h": 3600.0, "m": 60.0, "s": 1.0, "ms": 0.001}
_DURATION = re.compile(r"(\d{1,9}(?:\.\d{1,12})?)(ms|h|m|s)")


class GoogleError(NamedTuple):
    """What a google.rpc.Status says beyond its message: the status word, the reasons of its ErrorInfo, the ids of the
    quotas that were passed, the wait in seconds that it asks for, and links to help."""

    word: str = ""
    reasons: Tuple[str, ...] = ()
    quotas: Tuple[str, ...] = ()
    wait_s: Optional[float] = None
    links: Tuple[str, ...] = ()


def parse_duration(text: Any) -> Optional[float]:
    """Seconds of "34.07s", "900ms" or "18h31m10s"; None when it is not one."""
    if not isinstance(text, str) or not re.fullmatch(f"(?:{_DURATION.pattern})+", text):
        return None
    return sum(float(number) * _DURATION_UNITS[unit] for number, unit in _DURATION.findall(text))


def read_google_error(body: bytes) -> GoogleError:
    """The details of an error body, which may be wrapped in an array; nothing when it is of another shape."""
    try:
        value = json.loads(body.decode("utf-8", "replace"))
    except (ValueError, RecursionError):
        return GoogleError()
    error = as_dict(as_dict(value[0] if isinstance(value, list) and value else value).get("error"))
    details = error.get("details")
    details = [as_dict(detail) for detail in details] if isinstance(details, list) else []
    waits = [parse_duration(value) for detail in details
             for value in (detail.get("retryDelay"), as_dict(detail.get("metadata")).get("quotaResetDelay"))]
    return GoogleError(
        word=str(error.get("status") or ""), wait_s=next((wait for wait in waits if wait is not None), None),
        reasons=tuple(str(detail["reason"]) for detail in details if detail.get("reason")),
        quotas=tuple(str(as_dict(item).get("quotaId", "")) for detail in details
                     for item in detail.get("violations") or ()),
        links=tuple(str(as_dict(link).get("url", "")) for detail in details for link in detail.get("links") or ()))


def google_error(status: int, headers: Mapping[str, str], body: bytes, now: float) -> GatewayError:
    """The error that a body means; status 0 when it came inside an answer of status 200."""
    message, kind, code = error_fields(body)
    facts = read_google_error(body)
    if status < 400 or status == 499:           # 499: cancelled on their side, not a fault of the request
        status = GOOGLE_STATUS.get(facts.word) or (int(code) if re.fullmatch("[45]..", code) else 500)
    message = message or f"the provider answered {status} without a message"
    if "VALIDATION_REQUIRED" in facts.reasons and facts.links:
        message = f"{message} {facts.links[0]}"
    if any(reason.startswith("API_KEY_") for reason in facts.reasons) or _BAD_KEY.search(message):
        return CredentialRefused(message)
    asked = parse_retry_after(headers, now)
    wait = facts.wait_s if asked is None else asked
    if status == 429:
        return google_quota_error(message, facts, parse_text_delay(message) if wait is None else wait)
    return upstream_error(status, message, kind, facts.word.lower(), wait)


def google_quota_error(message: str, facts: GoogleError, wait_s: Optional[float]) -> GatewayError:
    """A 429 as a short pause or as a quota that is used up; the message always speaks of plan and billing."""
    if (any(_LONG_QUOTA.search(quota) for quota in facts.quotas) or GOOGLE_SPENT & set(facts.reasons)
            or (wait_s or 0.0) > LONGEST_PAUSE_S):
        return QuotaExceeded(message, retry_after=wait_s)
    if wait_s is None and any("PerMinute" in quota for quota in facts.quotas):
        wait_s = MINUTE_QUOTA_S
    if wait_s is not None or "RATE_LIMIT_EXCEEDED" in facts.reasons:
        return RateLimited(message, retry_after=wait_s)
    return upstream_error(429, message)


_TEXT_DELAYS = (re.compile(r"reset after ((?:\d+(?:\.\d+)?(?:ms|h|m|s))+)", re.IGNORECASE),
                re.compile(r"please retry in (\d+(?:\.\d+)?(?:ms|s))", re.IGNORECASE),
                re.compile(r'"retryDelay"\s*:\s*"([^"]+)"'))


def parse_text_delay(text: str) -> Optional[float]:
    """Seconds by the words "reset after 10m15s" or "Please retry in 34.07s", or a retryDelay field; None without."""
    found = (parse_duration(match.group(1)) for match in (pattern.search(text) for pattern in _TEXT_DELAYS) if match)
    return next((wait for wait in found if wait is not None), None)


# --- Google's schema dialects -----------------------------------------------------------------------------------------
#
# `parametersJsonSchema` takes JSON Schema and passes over what it does not know. `parameters` takes a subset of OpenAPI
# 3.0, and one unknown keyword anywhere is a 400 for the whole request.

MAX_SCHEMA_NODES = 5000             # what one tool's schema may grow to when its references are filled in
MAX_SCHEMA_DEPTH = 60               # far below Python's recursion limit
MAX_NOTE_CHARS = 200                # of a keyword's value that becomes text
_SCHEMA_TYPES = ("string", "number", "integer", "boolean", "array", "object", "null")
_SCHEMA_MAPS = ("properties", "patternProperties", "$defs", "definitions", "dependentSchemas", "dependencies")
_SCHEMA_LISTS = ("allOf", "anyOf", "oneOf", "prefixItems", "items")
_SCHEMA_SINGLES = ("items", "additionalItems", "additionalProperties", "unevaluatedItems", "unevaluatedProperties",
                   "contains", "propertyNames", "not", "if", "then", "else", "contentSchema")


def const_to_enum(schema: Any, depth: int = 0) -> Any:
    """A JSON Schema whose string and number constants are enumerations of one, since the lenient dialect passes over
    `const`. Only schemas are walked: data under default, enum or examples stays as it is."""
    if not isinstance(schema, Mapping) or depth > MAX_SCHEMA_DEPTH:
        return schema
    out = dict(schema)
    for name in _SCHEMA_MAPS:
        if isinstance(out.get(name), Mapping):
            out[name] = {key: const_to_enum(value, depth + 1) for key, value in out[name].items()}
    for name in _SCHEMA_LISTS:
        if isinstance(out.get(name), list):
            out[name] = [const_to_enum(value, depth + 1) for value in out[name]]
    out.update((name, const_to_enum(out[name], depth + 1)) for name in _SCHEMA_SINGLES
               if isinstance(out.get(name), Mapping))
    if isinstance(out.get("const"), (str, int, float)) and not isinstance(out["const"], bool):
        out.setdefault("enum", [out.pop("const")])
    return out


def clean_schema(schema: Mapping[str, Any]) -> Dict[str, Any]:
    """A JSON Schema in the strict dialect: references filled in, allOf merged, null as `nullable`, constants as strings
    of an enum. A keyword that the dialect lacks becomes words of the description. Cleaning twice changes nothing more.

    Recursion, a reference that leads nowhere, and what lies beyond the limits above become an object that says which
    type was meant: {"type": "object", "description": "See: Node"}."""
    return _SchemaCleaner(schema).clean(schema, frozenset({"#"}), 0)


def _is_count(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and value == int(value) >= 0


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _is_names(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(item, str) for item in value)


# Keywords that are kept as they are, if their value is what the dialect expects. The others have rules of their own:
# type, format, enum, nullable, description, properties, required, items, anyOf.
_KEPT: Dict[str, Callable[[Any], bool]] = {
    "title": _is_text, "pattern": _is_text, "minItems": _is_count, "maxItems": _is_count, "minLength": _is_count,
    "maxLength": _is_count, "minProperties": _is_count, "maxProperties": _is_count, "minimum": _is_number,
    "maximum": _is_number, "propertyOrdering": _is_names, "default": lambda value: True, "example": lambda value: True}
_RULED = frozenset({"type", "format", "enum", "nullable", "description", "properties", "required", "items", "anyOf"})
# Keywords whose loss costs a model nothing: names for references, and the usual closing of objects.
_DROPPED = frozenset({"$schema", "$id", "id", "$anchor", "$dynamicAnchor", "$vocabulary", "$comment", "$defs",
                      "definitions"})
_FORMATS = {"string": ("enum", "date-time"), "number": ("float", "double"), "integer": ("int32", "int64")}
# Which keywords speak of which type, to part {"type": ["string", "array"], ...} into alternatives.
_OF_TYPE = {
    "string": ("minLength", "maxLength", "pattern", "format", "enum", "const"),
    "number": ("minimum", "maximum", "format"),
    "integer": ("minimum", "maximum", "format"), "array": ("items", "prefixItems", "minItems", "maxItems"),
    "object": ("properties", "required", "minProperties", "maxProperties", "propertyOrdering")}
_LEAST = ("maximum", "maxItems", "maxLength", "maxProperties")
_MOST = ("minimum", "minItems", "minLength", "minProperties")


def literal(value: Any) -> str:
    """A JSON value as text that is not too long."""
    try:
        text = json_text(value)
    except (ValueError, TypeError, RecursionError):
        text = "…"
    return text if len(text) <= MAX_NOTE_CHARS else text[:MAX_NOTE_CHARS] + "…"


def note(name: str, value: Any) -> str:
    """A keyword as words for the description."""
    return f"{name}: {literal(value)}"


def add_words(schema: Mapping[str, Any], *words: str) -> Dict[str, Any]:
    """`schema` with more in its description; what it says already is not said again."""
    lines = [schema["description"]] if isinstance(schema.get("description"), str) and schema["description"] else []
    lines.extend(word for word in words if word not in lines)
    return {**schema, "description": "\n".join(lines)} if lines else dict(schema)


def type_words(schema: Mapping[str, Any]) -> List[str]:
    """The types that a schema names, in lower case and without what is none."""
    named = schema.get("type")
    words = [word.lower() for word in (named if isinstance(named, list) else [named]) if isinstance(word, str)]
    return [word for word in dict.fromkeys(words) if word in _SCHEMA_TYPES]


def merge_schemas(first: Mapping[str, Any], second: Mapping[str, Any]) -> Dict[str, Any]:
    """A schema for what fits both. Where that cannot be said, the first stays and the second becomes words."""
    out, words = dict(first), []
    for name, value in second.items():
        if name not in out:
            out[name] = value
        elif name == "description":
            words.append(value if isinstance(value, str) else "")
        elif name in _MERGES:
            out[name] = _MERGES[name](out[name], value)
        elif name not in _DROPPED and note(name, out[name]) != note(name, value):
            words.append(note(name, value))
    return add_words(out, *filter(None, words))


def _merge_types(first: Any, second: Any) -> Any:
    ours, theirs = type_words({"type": first}), type_words({"type": second})
    common = [word for word in ours if word in theirs or (word == "integer" and "number" in theirs)]
    if "number" in ours and "integer" in theirs:
        common.append("integer")
    return common or first


def _merge_lists(first: Any, second: Any) -> Any:
    if not isinstance(first, list) or not isinstance(second, list):
        return first if isinstance(first, list) else second
    return first + [item for item in second if item not in first]


def _merge_enums(first: Any, second: Any) -> Any:
    if not isinstance(first, list) or not isinstance(second, list):
        return first if isinstance(first, list) else second
    return [item for item in first if item in second] or first


def _merge_properties(first: Any, second: Any) -> Any:
    if not isinstance(first, Mapping) or not isinstance(second, Mapping):
        return first if isinstance(first, Mapping) else second
    return {**first, **{name: _merge_both(first[name], value) if name in first else value
                        for name, value in second.items()}}


def _merge_both(first: Any, second: Any) -> Any:
    return first if first is second else {"allOf": [first, second]}


def _merge_limits(choose: Callable[[Any, Any], Any]) -> Callable[[Any, Any], Any]:
    return lambda first, second: choose(first, second) if _is_number(first) and _is_number(second) else first


_MERGES: Dict[str, Callable[[Any, Any], Any]] = {
    "type": _merge_types, "required": _merge_lists, "enum": _merge_enums, "properties": _merge_properties,
    "items": _merge_both, "nullable": lambda first, second: first and second,
    **{name: _merge_limits(min) for name in _LEAST}, **{name: _merge_limits(max) for name in _MOST}}


def opaque(name: str) -> Dict[str, Any]:
    """What stands for a schema that cannot be written out."""
    return {"type": "object", "description": f"See: {name}"}


def is_null(schema: Mapping[str, Any]) -> bool:
    """Whether a schema allows null and nothing else."""
    return (type_words(schema) == ["null"] or schema.get("enum") == [None]
            or ("const" in schema and schema["const"] is None))


class _SchemaCleaner:
    """One run of `clean_schema`. `left` is what the result may still grow by: each node that is opened pays for its
    children, each reference for its size."""

    def __init__(self, root: Any) -> None:
        self._root = root
        self._left = MAX_SCHEMA_NODES

    def clean(self, node: Any, above: FrozenSet[str], depth: int) -> Dict[str, Any]:
        """The node in the strict dialect; `above` are the references that lead to it."""
        flat, above = self._flatten(node, above)
        return self._write(flat, above, depth)

    def _flatten(self, node: Any, above: FrozenSet[str]) -> Tuple[Dict[str, Any], FrozenSet[str]]:
        """The node without $ref and allOf, and the references that it used."""
        seen: Dict[str, None] = {}
        merged: Dict[str, Any] = {}
        waiting = [node]
        while waiting and self._left >= 0:
            item = waiting.pop(0)
            if not isinstance(item, Mapping):
                item = {"not": {}} if item is False else {}
            members = item.get("allOf")
            own = {name: value for name, value in item.items() if name not in ("$ref", "allOf")}
            if "$ref" in item:
                waiting.insert(0, self._follow(item["$ref"], above, seen))
            if isinstance(members, list):
                self._left -= len(members)
                waiting.extend(members)
            merged = merge_schemas(merged, own)
        return merged, above | frozenset(seen)

    def _follow(self, pointer: Any, above: FrozenSet[str], seen: Dict[str, None]) -> Any:
        if not isinstance(pointer, str):
            return {}
        if pointer in seen:                     # merged already
            return {}
        target = None if pointer in above else self._find(pointer)
        if target is None or self._left <= 0:
            return opaque(pointer.rstrip("/").rpartition("/")[2] or pointer)
        seen[pointer] = None
        self._left -= self._size(target)
        return target

    def _size(self, target: Any) -> int:
        fields = as_dict(target)
        enum, words = fields.get("enum"), fields.get("description")
        return 1 + (len(enum) if isinstance(enum, list) else 0) + (len(words) // 256 if isinstance(words, str) else 0)

    def _find(self, pointer: str) -> Any:
        """What a local reference points at (RFC 6901 in a fragment); None when there is no such place."""
        if not pointer.startswith("#"):
            return None
        place: Any = self._root
        for step in urllib.parse.unquote(pointer[1:]).split("/")[1:]:
            key = step.replace("~1", "/").replace("~0", "~")
            if isinstance(place, list) and key.isdecimal() and int(key) < len(place):
                place = place[int(key)]
            else:
                place = place.get(key) if isinstance(place, Mapping) else None
        return place if isinstance(place, (Mapping, bool)) else None

    def _write(self, flat: Dict[str, Any], above: FrozenSet[str], depth: int) -> Dict[str, Any]:
        flat, branches = self._unite(arrange_items(arrange_enum(flat)), above)
        if len(branches) == 1 and depth < MAX_SCHEMA_DEPTH and self._left > 0:      # an alternative to null, mostly
            self._left -= 1
            only, only_above = branches[0]
            return self._write(merge_schemas(flat, only), above | only_above, depth + 1)
        properties, has_items = flat.get("properties"), "items" in flat
        properties = properties if isinstance(properties, Mapping) else {}
        children = len(properties) + len(branches) + has_items
        if children and (depth >= MAX_SCHEMA_DEPTH or children > self._left):
            return opaque("the full schema")
        self._left -= children
        out, words = keep_known(flat)
        if properties:
            out["properties"] = {str(name): self.clean(value, above, depth + 1) for name, value in properties.items()}
        if has_items:
            out["items"] = self.clean(flat["items"], above, depth + 1)
        if branches:
            out["anyOf"] = [self._write(branch, theirs, depth + 1) for branch, theirs in branches]
        return add_words(settle_names(out, flat), *words)

    def _unite(self, flat: Dict[str, Any], above: FrozenSet[str],
               ) -> Tuple[Dict[str, Any], List[Tuple[Dict[str, Any], FrozenSet[str]]]]:
        """(the schema without its alternatives, the alternatives). Alternatives beside properties mostly say which of
        them go together: then the properties stay and the alternatives become words."""
        flat, choices = take_choices(arrange_types(flat))
        flattened = [self._flatten(choice, above) for choice in choices[:max(0, self._left)]]
        branches = [(branch, theirs) for branch, theirs in flattened if not is_null(branch)]
        if len(branches) < len(flattened):
            flat = {**flat, "nullable": True}
        if len(branches) > 1 and any(name in flat for name in ("properties", "items", "enum")):
            return add_words(flat, note("anyOf", choices)), []
        if branches and len(branches) > 1 and "type" in flat:
            shared = flat.pop("type")
            branches = [(branch if "type" in branch else {"type": shared, **branch}, theirs)
                        for branch, theirs in branches]
        return flat, branches


def arrange_enum(flat: Mapping[str, Any]) -> Dict[str, Any]:
    """const and enum as an enum of strings, null among them as nullable."""
    out = {name: value for name, value in flat.items() if name not in ("const", "enum")}
    members = flat.get("enum") if isinstance(flat.get("enum"), list) else []
    members = [flat["const"]] if "const" in flat else members
    texts = [item if isinstance(item, str) else literal(item) for item in members if item is not None]
    if None in members or (texts and "null" in type_words(flat)):
        out["nullable"] = True
    if texts:
        out.update(type="string", enum=list(dict.fromkeys(texts)))
    return out


def arrange_items(flat: Dict[str, Any]) -> Dict[str, Any]:
    """A tuple's items as alternatives; an array of anything says so, since the dialect wants items."""
    tuple_items = flat.get("prefixItems", flat.get("items"))
    if isinstance(tuple_items, list):
        flat = {name: value for name, value in flat.items() if name not in ("prefixItems", "items")}
        flat["items"] = {"anyOf": tuple_items} if tuple_items else {}
    if "items" not in flat and "array" in type_words(flat):
        flat = {**flat, "items": {}}
    return flat


def arrange_types(flat: Dict[str, Any]) -> Dict[str, Any]:
    """One type, or several as alternatives; null as nullable."""
    words = type_words(flat)
    out = {name: value for name, value in flat.items() if name != "type"}
    if "type" in flat and not words:
        out = add_words(out, note("type", flat["type"]))
    if "null" in words:
        out["nullable"] = True
    words = [word for word in words if word != "null"]
    if len(words) > 1 and "anyOf" not in flat and "oneOf" not in flat:
        return part_types(out, words)
    if len(words) > 1:
        out = add_words(out, note("type", words))
    implied = "object" if isinstance(flat.get("properties"), Mapping) else "array" if "items" in flat else None
    return {**out, **present(type=words[0] if words else implied)}


def part_types(flat: Mapping[str, Any], words: Sequence[str]) -> Dict[str, Any]:
    """A schema of several types as alternatives of one type each; every keyword goes to the types that it speaks of."""
    own = {name for word in words for name in _OF_TYPE.get(word, ())}
    choices = [{"type": word, **{name: flat[name] for name in _OF_TYPE.get(word, ()) if name in flat}}
               for word in words]
    return {**{name: value for name, value in flat.items() if name not in own}, "anyOf": choices}


def take_choices(flat: Dict[str, Any]) -> Tuple[Dict[str, Any], List[Any]]:
    """(the schema without anyOf and oneOf, the alternatives); of two sets the second becomes words."""
    sets = [(name, flat[name]) for name in ("anyOf", "oneOf") if isinstance(flat.get(name), list) and flat[name]]
    rest = {name: value for name, value in flat.items() if name not in ("anyOf", "oneOf")}
    return (add_words(rest, *(note(name, value) for name, value in sets[1:])), list(sets[0][1])) if sets else (rest, [])


def keep_known(flat: Mapping[str, Any]) -> Tuple[Dict[str, Any], List[str]]:
    """(the plain keywords that the dialect has, words for the others)."""
    out = {name: flat[name] for name in ("type", "enum", "description") if isinstance(flat.get(name), (str, list))}
    if flat.get("nullable") is True:
        out["nullable"] = True
    words = []
    for name, value in flat.items():
        if name in _KEPT and _KEPT[name](value):
            out[name] = int(value) if _KEPT[name] is _is_count else value
        elif name == "format" and value in _FORMATS.get(str(flat.get("type")), ()):
            out[name] = value
        elif name not in _RULED - {"format"} and name not in _DROPPED and not _says_nothing(name, value):
            words.append(note(name, value))
    return out, words


def _says_nothing(name: str, value: Any) -> bool:
    return name.startswith(("additionalP", "additionalI", "unevaluated")) and isinstance(value, bool)


def settle_names(out: Dict[str, Any], flat: Mapping[str, Any]) -> Dict[str, Any]:
    """`out` with `required` and `propertyOrdering` of properties that it has. Required may also be marked on
    the property itself, as in the third draft of JSON Schema."""
    properties, required = out.get("properties", {}), flat.get("required")
    names = list(required) if isinstance(required, list) else []
    names.extend(name for name, value in as_dict(flat.get("properties")).items()
                 if isinstance(value, Mapping) and value.get("required") is True)
    for field_name, wanted in (("required", names), ("propertyOrdering", out.pop("propertyOrdering", []))):
        kept = [name for name in dict.fromkeys(item for item in wanted if isinstance(item, str)) if name in properties]
        if kept:
            out[field_name] = kept
    return out


# --- google-vertex ----------------------------------------------------------------------------------------------------

VERTEX_HOSTS = {"global": "aiplatform.googleapis.com", "us": "aiplatform.us.rep.googleapis.com",
                "eu": "aiplatform.eu.rep.googleapis.com"}
VERTEX_ANTHROPIC = "vertex-2023-10-16"
CLAUDE_ON_VERTEX = AnthropicMessages()


def hosts_claude(model: Model) -> bool:
    """Whether the model is Anthropic's, at a host of other models."""
    return model.id.startswith("claude")


def vertex_base(model: Model, credential: Credential) -> str:
    """Scheme, host and version. The catalogue's URL has {location} in its host; another host is a proxy and stays."""
    location = credential.parts.get("location") or "global"
    if not re.fullmatch(r"[a-z][a-z0-9-]{0,40}", location):
        raise Unauthorized(f'"{location[:60]}" is not a Google Cloud location: check GOOGLE_CLOUD_LOCATION',
                           code="no_credentials", param="model")
    base = model.base_url.rstrip("/")
    if not base or "aiplatform.googleapis.com" in base:
        base = "https://" + VERTEX_HOSTS.get(location, f"{location}-aiplatform.googleapis.com")
    return base if re.search(r"/v\d[a-z0-9]*\Z", base) else base + "/v1"


def vertex_url(model: Model, credential: Credential, method: str) -> str:
    """The URL of a model's method. A key without project and location is one of express mode, which needs neither."""
    publisher, _, name = model.id.rpartition("/")
    publisher = publisher or ("anthropic" if hosts_claude(model) else "google")
    place = f"/publishers/{publisher}/models/{urllib.parse.quote(name, safe='@:')}{method}"
    project, location = credential.parts.get("project"), credential.parts.get("location")
    if credential.kind != "oauth" and not (project and location):
        return vertex_base(model, credential) + place
    if not project:
        raise Unauthorized(f'"{model.provider}" needs a Google Cloud project: set GOOGLE_CLOUD_PROJECT',
                           code="no_credentials", param="model")
    where = f"/projects/{urllib.parse.quote(project, safe=':')}/locations/{location or 'global'}"
    return vertex_base(model, credential) + where + place


class GoogleVertex(GoogleGenerativeAI):
    """Gemini and Claude on Vertex AI. `Credential.parts`: project, location, quota_project."""

    name = "google-vertex"

    def carries(self, model: Model) -> FrozenSet[str]:
        """By the model's own protocol."""
        return CLAUDE_ON_VERTEX.carries(model) if hosts_claude(model) else super().carries(model)

    def replays(self, part: Thinking, model: Model) -> bool:
        """By the model's own protocol."""
        return CLAUDE_ON_VERTEX.replays(part, model) if hosts_claude(model) else super().replays(part, model)

    def fit(self, request: Request, model: Model) -> Tuple[Request, List[str]]:
        """By the model's own protocol."""
        return CLAUDE_ON_VERTEX.fit(request, model) if hosts_claude(model) else super().fit(request, model)

    def build(self, request: Request, model: Model, credential: Credential) -> Call:
        """See `UpstreamProtocol.build`."""
        if hosts_claude(model):
            return self._build_claude(request, model, credential)
        body = dumps(self.body(request, model)).encode("ascii")
        return Call("POST", vertex_url(model, credential, self.method(request)), self.headers(model, credential), body)

    def _build_claude(self, request: Request, model: Model, credential: Credential) -> Call:
        """The Messages body, with the model in the URL and the version in the body."""
        body = json.loads(CLAUDE_ON_VERTEX.build(request, model, Credential()).body)
        del body["model"]
        method = ":streamRawPredict" if request.stream else ":rawPredict"
        return Call("POST", vertex_url(model, credential, method), self.headers(model, credential),
                    dumps({"anthropic_version": VERTEX_ANTHROPIC, **body}).encode("ascii"))

    def headers(self, model: Model, credential: Credential) -> Dict[str, str]:
        """Request headers; x-goog-user-project names whom to bill when that is not the project called."""
        billed = credential.parts.get("quota_project") if credential.kind == "oauth" else None
        return {**super().headers(model, credential), **present(**{"x-goog-user-project": billed})}

    def reader(self, model: Model, stamp: Stamp) -> Reader:
        """See `UpstreamProtocol.reader`."""
        return AnthropicReader() if hosts_claude(model) else super().reader(model, stamp)


# --- google-gemini-cli ------------------------------------------------------------------------------------------------

ANTIGRAVITY = "antigravity"
ANTIGRAVITY_AGENT = "antigravity/hub/2.9.1 darwin/arm64"    # the service refuses newer models below 2.9.0
ANTIGRAVITY_BETA = "interleaved-thinking-2025-05-14"


class CloudCodeAssist(GoogleGenerativeAI):
    """Gemini behind a personal Google log-in: POST {base}/v1internal:streamGenerateContent?alt=sse, the Gemini request
    inside a wrapper that names project and model. `Credential.parts`: project.

    Compat flag `codeAssistAgent`: gemini-cli, or antigravity, which has Claude and GPT-OSS too."""

    name = "google-gemini-cli"

    def needs_bytes(self, part: Union[Image, Document], model: Model) -> bool:
        """See `UpstreamProtocol.needs_bytes`."""
        return True

    def build(self, request: Request, model: Model, credential: Credential) -> Call:
        """See `UpstreamProtocol.build`."""
        project = credential.parts.get("project")
        if not project:
            raise Unauthorized(f'the log-in for "{model.provider}" names no Google Cloud project: log in again, or set '
                               "GOOGLE_CLOUD_PROJECT", code="no_credentials", param="model")
        inner = {**self.body(request, model), "sessionId": session_number(request)}
        digest = hashlib.sha256(dumps(inner).encode("ascii")).hexdigest()
        wrapper = {"project": project, "model": bare_id(model.id), "request": inner,
                   **code_assist_fields(agent_of(model), digest)}
        url = join_url(model.base_url, "/v1internal" + self.method(request))
        return Call("POST", url, self.headers(model, credential), dumps(wrapper).encode("ascii"))

    def headers(self, model: Model, credential: Credential) -> Dict[str, str]:
        """Request headers, by agent."""
        headers = authorization(model, credential)
        if agent_of(model) == ANTIGRAVITY:
            headers["user-agent"] = ANTIGRAVITY_AGENT
            if hosts_claude(model) and model.reasoning:
                headers["anthropic-beta"] = ANTIGRAVITY_BETA
        return headers

    def is_strict(self, model: Model) -> bool:
        """Claude's tools are declared in the strict dialect here."""
        return hosts_claude(model) or super().is_strict(model)

    def _thought(self, part: Thinking, model: Model) -> Dict[str, Any]:
        thought = super()._thought(part, model)
        return {} if hosts_claude(model) and not thought.get("text") else thought      # empty text breaks Claude

    def tool_config(self, request: Request, model: Model) -> Optional[Dict[str, Any]]:
        """Claude's arguments are checked, unless a tool takes none: a checked schema must have properties."""
        has_choice = request.tool_choice is not None and request.tool_choice.kind != "auto"
        if not hosts_claude(model) or has_choice or not request.tools:
            return super().tool_config(request, model)
        checked = all(tool.schema.get("properties") for tool in request.tools)
        return {"functionCallingConfig": {"mode": "VALIDATED" if checked else "AUTO"}}

    def config(self, request: Request, model: Model) -> Dict[str, Any]:
        """The generationConfig. Antigravity takes a limit for Claude only, and Claude a budget below it."""
        config = super().config(request, model)
        if agent_of(model) == ANTIGRAVITY and not hosts_claude(model):
            config.pop("maxOutputTokens", None)
        budget, limit = as_dict(config.get("thinkingConfig")).get("thinkingBudget"), config.get("maxOutputTokens")
        if hosts_claude(model) and budget and limit and budget >= limit:
            config["thinkingConfig"] = {**config["thinkingConfig"], "thinkingBudget": limit - 1}
            if limit - 1 < MIN_BUDGET:
                del config["thinkingConfig"]
        return config

    def thinking(self, request: Request, model: Model) -> Tuple[Optional[Dict[str, Any]], int]:
        """As Gemini's; Claude takes a budget of at least 1024 tokens, or nothing."""
        if not hosts_claude(model) or request.reasoning is None:
            return super().thinking(request, model)
        if request.reasoning.level == "off":
            return None, 0
        budget = max(MIN_BUDGET, request.reasoning.budget or LEVEL_BUDGETS[request.reasoning.level])
        return {"includeThoughts": True, "thinkingBudget": budget}, budget

    def reader(self, model: Model, stamp: Stamp) -> Reader:
        """See `UpstreamProtocol.reader`."""
        return CodeAssistReader(self.name, stamp)

    def parse_error(self, status: int, headers: Mapping[str, str], body: bytes, now: float) -> GatewayError:
        """As Gemini's, with the waits that this service names in more ways."""
        error = super().parse_error(status, headers, body, now)
        wait = parse_quota_delay(body.decode("utf-8", "replace"), headers, now)
        if isinstance(error, UpstreamError) and wait is not None:
            error.retry_after = wait
        return error


def agent_of(model: Model) -> str:
    """Which of the two services the model is at."""
    return model.flag("codeAssistAgent", "gemini-cli")


def code_assist_fields(agent: str, digest: str) -> Dict[str, Any]:
    """What the wrapper says of the caller. The request id comes from the request, so that a repeat has the same."""
    if agent != ANTIGRAVITY:
        return {"userAgent": NAME, "requestId": f"{NAME}-{digest[:24]}"}
    parts = (digest[:8], digest[8:12], digest[12:16], digest[16:20], digest[20:32])
    return {"userAgent": ANTIGRAVITY, "requestId": "agent-" + "-".join(parts), "requestType": "agent"}


def session_number(request: Request) -> str:
    """A conversation's id, from the first words of its user: the same for all its turns."""
    words = next((part.text for message in request.messages if message.role == "user"
                  for part in message.parts if isinstance(part, Text)), "")
    digest = hashlib.sha256(words.encode("utf-8", "replace")).digest()
    return f"-{int.from_bytes(digest[:8], 'big') >> 1}"


class CodeAssistReader(GeminiReader):
    """Gemini chunks inside a `response` field; events without one say nothing to us."""

    def on_chunk(self, chunk: Any) -> Iterator[Event]:
        """The events that one wrapped chunk amounts to."""
        if isinstance(chunk, list) and chunk:
            chunk = chunk[0]
        if not isinstance(chunk, dict) or chunk.get("error"):
            yield from super().on_chunk(chunk)
        elif isinstance(chunk.get("response"), dict):
            yield from super().on_chunk({"responseId": chunk.get("traceId"), **chunk["response"]})


def parse_quota_delay(text: str, headers: Mapping[str, str], now: float) -> Optional[float]:
    """Seconds that Code Assist asks to wait, one added against early retries; None when it names none. Headers come
    first: retry-after, x-ratelimit-reset (epoch seconds), x-ratelimit-reset-after; then the body's words."""
    reset, after = (_header_number(headers, "x-ratelimit-reset" + suffix) for suffix in ("", "-after"))
    waits = (parse_retry_after(headers, now), None if reset is None or reset <= now else reset - now, after,
             parse_text_delay(text))
    wait = next((wait for wait in waits if wait is not None), None)
    return None if wait is None else math.ceil(round((wait + 1.0) * 1000, 3)) / 1000


def _header_number(headers: Mapping[str, str], name: str) -> Optional[float]:
    value = headers.get(name, "").strip()
    return float(value) if re.fullmatch(r"\d{1,12}(\.\d+)?", value) else None


# --- Signatures of tool calls -----------------------------------------------------------------------------------------


class Memory:
    """The last `limit` values by key, each for `ttl_s` seconds. Safe to share between threads."""

    def __init__(self, limit: int = 4096, ttl_s: float = 6 * 3600.0) -> None:
        self._limit = limit
        self.ttl_s = ttl_s
        self._lock = threading.Lock()
        self._entries: Dict[str, Tuple[float, Any]] = {}

    def put(self, key: str, value: Any, now: float) -> None:
        """Keeps a value; the oldest make room."""
        with self._lock:
            self._entries.pop(key, None)        # put in again below, as the newest
            self._entries[key] = (now + self.ttl_s, value)
            while len(self._entries) > self._limit:
                del self._entries[next(iter(self._entries))]

    def get(self, key: str, now: float) -> Any:
        """A value, None when it is not known, or no longer."""
        with self._lock:
            expires, value = self._entries.get(key, (now, None))
            if expires > now:
                return value
            self._entries.pop(key, None)
            return None

    def __len__(self) -> int:
        with self._lock:
            return len(self._entries)


class SignatureMemory:
    """What the protocols of clients have no place for: the signatures of tool calls by call id, and from which model and
    account a signature is that the client was given bare. Of signatures it keeps a hash only."""

    def __init__(self, limit: int = 4096, ttl_s: float = 6 * 3600.0) -> None:
        self._calls = Memory(limit, ttl_s)
        self._origins = Memory(limit, ttl_s)

    def remember(self, call_id: str, maker: str, signature: str, now: float, origin: str = "") -> None:
        """Keeps the signature of a call."""
        self._calls.put(fit_id(call_id, ANTHROPIC_ID_LIMIT), (maker, signature, origin), now)   # as clients are given it

    def recall(self, call_id: str, now: float) -> Optional[Tuple[str, str, str]]:
        """(maker, signature, origin) of a call, None when it is not known, or no longer."""
        return self._calls.get(fit_id(call_id, ANTHROPIC_ID_LIMIT), now)

    def note_origin(self, signature: str, origin: str, now: float) -> None:
        """Keeps where a signature is from."""
        self._origins.put(_digest(signature), origin, now)

    def is_foreign(self, signature: str, origin: str, now: float) -> bool:
        """Whether the signature is known to be from elsewhere."""
        return self._origins.get(_digest(signature), now) not in (None, origin)

    def __len__(self) -> int:
        return len(self._calls)


def _digest(text: Any) -> str:
    text = text if isinstance(text, str) else repr(text)
    return hashlib.sha256(text.encode("utf-8", "replace")).hexdigest()[:24]


def origin_of(model: Model, credential: Credential) -> str:
    """Model and account, as seals name them."""
    return f"{model.full_id}@{credential.account}"


def without_seals(request: Request, is_foreign: Callable[[str, str], bool]) -> Request:
    """`request` without the signatures of which `is_foreign(signature, origin)` holds, and without the thinking that they
    seal; they are added to its `foreign`."""
    foreign = {signature for signature in request.seals if is_foreign(signature, "")}

    def is_sealed(part: Part) -> bool:
        if not isinstance(part, (Thinking, ToolCall)) or not part.signature or not is_foreign(part.signature, part.origin):
            return False
        foreign.add(part.signature)
        return True

    def strip(parts: Iterable[Part]) -> Iterator[Part]:
        for part in parts:
            if not is_sealed(part):
                yield part
            elif isinstance(part, ToolCall):
                yield replace(part, signature=None, maker="", origin="")

    messages = tuple(replace(message, parts=tuple(strip(message.parts))) if message.role == "assistant" else message
                     for message in request.messages)
    return replace(request, messages=messages, foreign=request.foreign | foreign) if foreign else request


def with_remembered(request: Request, memory: SignatureMemory, now: float) -> Request:
    """`request` with the signatures that its client dropped, put back on their calls."""
    def sign(part: Part) -> Part:
        found = memory.recall(part.id, now) if isinstance(part, ToolCall) and not part.signature else None
        return replace(part, maker=found[0], signature=found[1], origin=found[2]) if found else part

    messages = tuple(replace(message, parts=tuple(sign(part) for part in message.parts))
                     if message.role == "assistant" else message for message in request.messages)
    return replace(request, messages=messages) if messages != request.messages else request


# --- mistral-conversations --------------------------------------------------------------------------------------------

MISTRAL_ID_LENGTH = 9               # tool-call ids match ^[a-zA-Z0-9]{9}$, else 400, code 3280
MISTRAL_HOTTEST = 1.5
MISTRAL_EMPTY_RESULT = "(no tool output)"
MISTRAL_ERROR_MARK = "[tool error] "
# Mistral's validator lets nobody but the assistant speak behind tool results.
MISTRAL_GAP = "I have processed the tool results."
MISTRAL_CHOICES = {"auto": "auto", "none": "none", "required": "any"}


def mistral_ids(ids: Iterable[str]) -> Dict[str, str]:
    """Each tool-call id → nine letters or digits. Ids that fit stay; others are made from their own letters and digits
    or a hash of these, no two alike. What an id becomes does not depend on ids that come later (unless they fit),
    so that a conversation that grows keeps its beginning, and the cache keeps working."""
    ids = list(dict.fromkeys(ids))
    out = {call_id: call_id for call_id in ids if re.fullmatch(f"[A-Za-z0-9]{{{MISTRAL_ID_LENGTH}}}", call_id)}
    taken = set(out)
    for call_id in ids:
        if call_id in out:
            continue
        bare, count = re.sub("[^A-Za-z0-9]", "", call_id), 0
        short = bare
        while len(short) != MISTRAL_ID_LENGTH or short in taken:
            seed = f"{bare}:{count}" if count else bare
            short = hashlib.sha256(seed.encode("ascii")).hexdigest()[:MISTRAL_ID_LENGTH]
            count += 1
        out[call_id] = short
        taken.add(short)
    return out


class MistralConversations(OpenAICompletions):
    """Mistral's chat completions: POST {base}/v1/chat/completions. Close to OpenAI's, but strict: unknown fields, other
    orders of turns and other ids are refused; thinking travels inside the content."""

    name = "mistral-conversations"
    forwards = frozenset({"prompt_cache_key"})

    def carries(self, model: Model) -> FrozenSet[str]:
        """What Mistral's schema has a field for."""
        fields = {"temperature", "top_p", "top_k", "stop", "seed", "frequency_penalty", "presence_penalty",
                  "parallel_tools", "output", "json_object"}
        return frozenset(fields | {"reasoning"} if model.reasoning else fields)

    def replays(self, part: Thinking, model: Model) -> bool:
        """Only what came from here."""
        return part.maker == self.name and not part.redacted

    def build(self, request: Request, model: Model, credential: Credential) -> Call:
        """See `UpstreamProtocol.build`."""
        messages = [chat_system(text.text for text in request.system)] if request.system else []
        body = present(
            model=model.id, messages=messages + mistral_messages(request.messages), stream=request.stream or None,
            temperature=None if request.temperature is None else min(request.temperature, MISTRAL_HOTTEST),
            top_p=request.top_p, top_k=request.top_k, max_tokens=request.max_tokens, stop=list(request.stop) or None,
            random_seed=request.seed, frequency_penalty=request.frequency_penalty,
            presence_penalty=request.presence_penalty, response_format=self._response_format(request.output),
            tools=[self._tool(tool, model) for tool in request.tools] or None)
        if request.tools:
            body.update(present(tool_choice=self._tool_choice(request.tool_choice),
                                parallel_tool_calls=request.parallel_tools))
        body.update(mistral_reasoning(request.reasoning, model))
        body.update(model.sampling)
        return self.post(body, request, model, credential)

    def post(self, body: Dict[str, Any], request: Request, model: Model, credential: Credential) -> Call:
        """The call that sends a finished body. A client's name for its conversation keeps it on one machine, by
        header, and there in its cache, by field."""
        session = request.session
        headers = authorization(model, credential, model.flag("auth", "bearer"))
        if re.fullmatch(r"[\x21-\x7e]{1,256}", session):
            body = {**body, "prompt_cache_key": session}
            headers = {"x-affinity": session, **headers}
        return Call("POST", join_url(model.base_url, "/v1/chat/completions"), headers, dumps(body).encode("ascii"))

    def _tool_choice(self, choice: Optional[ToolChoice]) -> Any:
        return super()._tool_choice(choice) if choice is None or choice.kind == "tool" else MISTRAL_CHOICES[choice.kind]

    def reader(self, model: Model, stamp: Stamp) -> Reader:
        """See `UpstreamProtocol.reader`."""
        return MistralReader(model, stamp)

    def parse_error(self, status: int, headers: Mapping[str, str], body: bytes, now: float) -> GatewayError:
        """See `UpstreamProtocol.parse_error`; what the validator found is put in words."""
        message, kind, code = error_fields(body)
        message = mistral_details(body) or message or f"the provider answered {status} without a message"
        return upstream_error(status, message, kind, code, parse_retry_after(headers, now))


def mistral_reasoning(reasoning: Optional[Reasoning], model: Model) -> Dict[str, Any]:
    """How hard to think: `reasoning_effort` where the catalogue maps levels, else the older switch `prompt_mode`. A
    compat flag supportsReasoningEffort overrides that."""
    level = fit_level(reasoning.level, model) if reasoning and model.reasoning else None
    if level is None:
        return {}
    if not model.flag("supportsReasoningEffort", bool(model.thinking_levels)):
        return {} if level == "off" else {"prompt_mode": "reasoning"}
    return present(reasoning_effort=model.thinking_levels.get(level, None if level == "off" else "high"))


def mistral_messages(messages: Sequence[Message]) -> List[Dict[str, Any]]:
    """Turns in an order that Mistral takes, with ids of its shape. An assistant turn that comes last is a prefix, to be
    gone on with."""
    calls = [part for message in messages for part in message.parts if isinstance(part, ToolCall)]
    ids = mistral_ids([call.id for call in calls] + [part.call_id for message in messages for part in message.parts
                                                     if isinstance(part, ToolResult)])
    names = {call.id: call.name for call in calls}
    out: List[Dict[str, Any]] = []
    for message in messages:
        for turn in _mistral_turns(message, ids, names):
            if turn["role"] in ("user", "system") and out and out[-1]["role"] == "tool":
                out.append({"role": "assistant", "content": MISTRAL_GAP})
            out.append(turn)
    if out and out[-1]["role"] == "assistant":
        out[-1]["prefix"] = True
    return out


def _mistral_turns(message: Message, ids: Mapping[str, str], names: Mapping[str, str]) -> List[Dict[str, Any]]:
    if message.role == "tool":
        return [_mistral_result(part, ids, names) for part in message.parts if isinstance(part, ToolResult)]
    if message.role == "assistant":
        return _mistral_assistant(message.parts, ids)
    if message.role == "system":
        return [chat_system(part.text for part in message.parts if isinstance(part, Text))]
    return [{"role": "user", "content": mistral_content(message.parts)}]


def _mistral_assistant(parts: Sequence[Part], ids: Mapping[str, str]) -> List[Dict[str, Any]]:
    text = "".join(part.text for part in parts if isinstance(part, Text))
    content: Any = text or None
    thinking = mistral_thinking(part for part in parts if isinstance(part, Thinking))
    if thinking:
        content = [thinking, *([{"type": "text", "text": text}] if text else [])]
    calls = [{"id": ids[part.id], "type": "function",
              "function": {"name": part.name, "arguments": part.arguments or "{}"}}
             for part in parts if isinstance(part, ToolCall)]
    turn = present(role="assistant", content=content, tool_calls=calls or None)
    return [turn] if len(turn) > 1 else []


def mistral_thinking(parts: Iterable[Thinking]) -> Optional[Dict[str, Any]]:
    """One thinking chunk: Mistral refuses a turn whose thinking is in several."""
    parts = [part for part in parts if part.text or part.signature]
    if not parts:
        return None
    signature = next((part.signature for part in reversed(parts) if part.signature), None)
    return present(type="thinking", thinking=[{"type": "text", "text": "\n".join(part.text for part in parts)}],
                   signature=signature)


def _mistral_result(result: ToolResult, ids: Mapping[str, str], names: Mapping[str, str]) -> Dict[str, Any]:
    text = "\n".join(part.text for part in result.parts if isinstance(part, Text))
    shown = [part for part in result.parts if isinstance(part, (Image, Document))]
    text = (MISTRAL_ERROR_MARK if result.is_error else "") + (text or ("" if shown else MISTRAL_EMPTY_RESULT))
    first = [Text(text)] if text else []
    return {"role": "tool", "tool_call_id": ids[result.call_id], "name": names.get(result.call_id, "unknown"),
            "content": mistral_content([*first, *shown])}


def mistral_content(parts: Sequence[Part]) -> Any:
    """Parts as a string, or as chunks when there is more than text."""
    if all(isinstance(part, Text) for part in parts):
        return "\n".join(part.text for part in parts if isinstance(part, Text))
    return [_mistral_chunk(part) for part in parts]


def _mistral_chunk(part: Part) -> Dict[str, Any]:
    if isinstance(part, Image):
        return {"type": "image_url", "image_url": part.url or data_url(part)}
    if isinstance(part, Document):
        return present(type="document_url", document_url=part.url or data_url(part), document_name=part.name)
    return {"type": "text", "text": part.text if isinstance(part, Text) else ""}


def mistral_details(body: bytes) -> str:
    """The validator's findings in an error body, `detail` at the top or inside `message`: "place: what"; "" if none."""
    try:
        data = as_dict(json.loads(body))
    except (ValueError, RecursionError):
        return ""
    details = as_dict(data.get("message")).get("detail") or data.get("detail")
    if not isinstance(details, list):
        return details[:MAX_MESSAGE_CHARS] if isinstance(details, str) else ""
    found = [(".".join(map(str, item.get("loc") or ())), item.get("msg") or item.get("type") or "invalid")
             for item in details if isinstance(item, dict)]
    return "; ".join(f"{place}: {what}" if place else str(what) for place, what in found)[:MAX_MESSAGE_CHARS]


class MistralReader(ChatReader):
    """Mistral's chunks → events: thinking inside the content, and fields that OpenAI names otherwise put right."""

    def __init__(self, model: Model, stamp: Stamp) -> None:
        super().__init__(model, stamp)
        self._signature: Optional[str] = None

    def _chunk(self, chunk: Any) -> Iterator[Event]:
        if isinstance(chunk, dict):
            if chunk.get("object") == "error":
                raise stream_error({"error": chunk})
            chunk = {**chunk, **present(usage=mistral_usage(chunk.get("usage")))}
            if isinstance(chunk.get("choices"), list):
                chunk["choices"] = [self._choice(as_dict(choice)) for choice in chunk["choices"]]
        yield from super()._chunk(chunk)

    def _choice(self, choice: Dict[str, Any]) -> Dict[str, Any]:
        if choice.get("finish_reason") == "model_length":
            choice = {**choice, "finish_reason": "length"}
        delta = as_dict(choice.get("delta"))
        calls = [{**call, "id": None} if call.get("id") == "null" else call for call in delta.get("tool_calls") or ()]
        return {**choice, "delta": {**delta, "tool_calls": calls}}

    def _done(self, stop_reason: str) -> Iterator[Event]:
        if self._started and self._stop is None:
            raise UpstreamProtocolError("the provider's stream ended without a finish reason")
        yield from super()._done(stop_reason)

    def _delta(self, delta: Dict[str, Any]) -> Iterator[Event]:
        content = delta.get("content")
        if isinstance(content, list):
            for chunk in map(as_dict, content):
                yield from self._content(chunk)
            delta = {**delta, "content": None}
        yield from super()._delta(delta)

    def _content(self, chunk: Dict[str, Any]) -> Iterator[Event]:
        if chunk.get("type") == "thinking":
            inner = chunk.get("thinking")
            text = inner if isinstance(inner, str) else "".join(as_dict(item).get("text") or "" for item in inner or ())
            if text or chunk.get("signature"):
                yield from self._write(Thinking, text)
            self._signature = chunk.get("signature") or self._signature
        elif chunk.get("text"):
            yield from self._write(Text, chunk["text"])

    def _write(self, kind: type, text: str) -> Iterator[Event]:
        if kind is Thinking and Thinking not in self._parts:
            if Text in self._parts:
                yield self._end(Text)
            yield self._parts.start(Thinking, Thinking(maker=MistralConversations.name))
        if text:
            yield from super()._write(kind, text)

    def _end(self, key: Any) -> PartEnd:
        if key is not Thinking:
            return super()._end(key)
        signature, self._signature = self._signature, None
        return self._parts.end(key, signature)


def mistral_usage(usage: Any) -> Optional[Dict[str, Any]]:
    """Usage with the cached tokens where OpenAI has them; Mistral has had three places for them."""
    if not isinstance(usage, dict):
        return None
    cached = next((count for count in (
        as_dict(usage.get("prompt_tokens_details")).get("cached_tokens"),
        as_dict(usage.get("prompt_token_details")).get("cached_tokens"), usage.get("num_cached_tokens")) if count), 0)
    cached = min(token_count(cached), token_count(usage.get("prompt_tokens")))
    return {**usage, "prompt_tokens_details": {"cached_tokens": cached}}


# --- AWS Signature, version 4 -----------------------------------------------------------------------------------------

_AWS_SIGNED = re.compile(r"content-type|x-amz(?!n-trace-id).*")
_AWS_OWN = re.compile(r"host|authorization|x-amz-.*")       # headers that a configuration may not set
_AWS_SAFE = "-._~"


def sign_v4(call: Call, keys: Mapping[str, str], region: str, service: str, now: float) -> Call:
    """`call` with the headers of an AWS signature, made for the second `now`; header names in lower case.

    `keys` are `access_key_id`, `secret_access_key` and perhaps `session_token`. The path is encoded once more for the
    signature, as for every service but S3; `host` is what the transport will send."""
    url = urllib.parse.urlsplit(call.url)
    stamp = time.strftime("%Y%m%dT%H%M%SZ", time.gmtime(now))
    headers = {**call.headers, "x-amz-date": stamp}
    if keys.get("session_token"):
        headers["x-amz-security-token"] = keys["session_token"]
    signed = {"host": url.netloc.rpartition("@")[2], **{
        name: " ".join(value.split()) for name, value in headers.items() if _AWS_SIGNED.fullmatch(name)}}
    names = ";".join(sorted(signed))
    canonical = "\n".join((
        call.method, urllib.parse.quote(url.path or "/", safe="/" + _AWS_SAFE), canonical_query(url.query),
        *(f"{name}:{signed[name]}" for name in sorted(signed)), "", names, hashlib.sha256(call.body).hexdigest()))
    scope = f"{stamp[:8]}/{region}/{service}/aws4_request"
    text = "\n".join(("AWS4-HMAC-SHA256", stamp, scope, hashlib.sha256(canonical.encode("utf-8")).hexdigest()))
    key = signing_key(keys["secret_access_key"], scope)
    signature = hmac.new(key, text.encode("ascii"), hashlib.sha256).hexdigest()
    headers["authorization"] = (f"AWS4-HMAC-SHA256 Credential={keys['access_key_id']}/{scope}, SignedHeaders={names}, "
                                f"Signature={signature}")
    return call._replace(headers=headers)


def canonical_query(query: str) -> str:
    """A URL's query as AWS signs it: pairs sorted, each name and value percent-encoded."""
    pairs = urllib.parse.parse_qsl(query, keep_blank_values=True)
    quoted = sorted([urllib.parse.quote(text, safe=_AWS_SAFE) for text in pair] for pair in pairs)
    return "&".join(f"{name}={value}" for name, value in quoted)


def signing_key(secret: str, scope: str) -> bytes:
    """The key for one day, region and service: each step of the scope hashed into it."""
    key = ("AWS4" + secret).encode("utf-8")
    for step in scope.split("/"):
        key = hmac.new(key, step.encode("utf-8"), hashlib.sha256).digest()
    return key


# --- AWS regions ------------------------------------------------------------------------------------------------------

AWS_DEFAULT_REGION = "us-east-1"
_ARN_REGION = re.compile(r"arn:aws[a-z-]*:(?:bedrock|sagemaker):([a-z0-9-]+):")
_BEDROCK_HOST = re.compile(r"(bedrock(?:-runtime)?(?:-fips)?)\.([a-z0-9-]+)\.amazonaws\.com(?:\.cn)?")
_PRIVATE_HOST = re.compile(r".*\.bedrock(?:-runtime)?(?:-fips)?\.([a-z0-9-]+)\.vpce\.amazonaws\.com(?:\.cn)?")
# Where a cross-region profile can be called when nobody named a region: the catalogue's own host is in us-east-1, which
# refuses these.
PROFILE_REGIONS = {"eu": "eu-central-1", "apac": "ap-southeast-1", "jp": "ap-northeast-1", "au": "ap-southeast-2",
                   "ca": "ca-central-1", "in": "ap-south-1", "us-gov": "us-gov-west-1"}


def bedrock_region(model_id: str, url: str, parts: Mapping[str, str]) -> str:
    """The region of a call. An ARN names its own; then what is configured (`region`), the region of the host, that of
    the default profile (`profile_region`), us-east-1."""
    arn = _ARN_REGION.match(model_id)
    if arn or parts.get("region"):
        return arn.group(1) if arn else parts["region"]
    host = urllib.parse.urlsplit(url).netloc
    standard, private = _BEDROCK_HOST.fullmatch(host), _PRIVATE_HOST.fullmatch(host)
    if standard and standard.group(2) == AWS_DEFAULT_REGION:
        return PROFILE_REGIONS.get(model_id.partition(".")[0], AWS_DEFAULT_REGION)
    found = standard.group(2) if standard else private and private.group(1)
    return found or parts.get("profile_region") or AWS_DEFAULT_REGION


def aws_host(service: str, region: str) -> str:
    """The public host of an AWS service in a region."""
    return f"{service}.{region}.amazonaws.com" + (".cn" if region.startswith("cn-") else "")


def move_to_region(url: str, region: str) -> str:
    """`url` with its standard Bedrock host put into `region`; any other host (a proxy, a private endpoint) is kept."""
    split = urllib.parse.urlsplit(url)
    standard = _BEDROCK_HOST.fullmatch(split.netloc)
    return split._replace(netloc=aws_host(standard.group(1), region)).geturl() if standard else url


# --- bedrock-converse-stream ------------------------------------------------------------------------------------------

BEDROCK_STOP = {"end_turn": "stop", "stop_sequence": "stop_sequence", "max_tokens": "length", "tool_use": "tool_use",
                "model_context_window_exceeded": "overflow", "guardrail_intervened": "refusal",
                "content_filtered": "refusal", "refusal": "refusal", "pause_turn": "pause"}
BEDROCK_FAILURES = frozenset({"malformed_model_output", "malformed_tool_use"})
# Exception names, without "Exception" and in lower case → the status whose class they are. Not always the status that
# they come with: 424 is no fault of the client's, and a key that AWS does not know comes as 403.
BEDROCK_STATUS = {
    "validation": 400, "conflict": 409, "servicequotaexceeded": 402, "accessdenied": 403, "resourcenotfound": 404,
    "modeltimeout": 408, "modelerror": 500, "modelstreamerror": 500, "throttling": 429, "toomanyrequests": 429,
    "modelnotready": 429, "internalserver": 500, "internalservererror": 500, "internalfailure": 500,
    "serviceunavailable": 503, "unrecognizedclient": 401, "invalidsignature": 401, "signaturedoesnotmatch": 401,
    "incompletesignature": 401,
    "expiredtoken": 401, "invalidclienttokenid": 401, "missingauthenticationtoken": 401, "requestexpired": 401}
BEDROCK_IMAGES = {"image/png": "png", "image/jpeg": "jpeg", "image/jpg": "jpeg", "image/gif": "gif",
                  "image/webp": "webp"}
_OFFICE = "application/vnd.openxmlformats-officedocument."
BEDROCK_DOCUMENTS = {
    "application/pdf": "pdf", "text/csv": "csv", "text/html": "html", "text/plain": "txt", "text/markdown": "md",
    "application/msword": "doc", "application/vnd.ms-excel": "xls", _OFFICE + "wordprocessingml.document": "docx",
    _OFFICE + "spreadsheetml.sheet": "xlsx"}
BEDROCK_CHOICES: Dict[str, Callable[[ToolChoice], Dict[str, Any]]] = {
    "auto": lambda choice: {"auto": {}}, "required": lambda choice: {"any": {}},
    "tool": lambda choice: {"tool": {"name": choice.name}}}
BLANK_TURN = "…"                    # Bedrock refuses blank text and empty turns
MOVED_NOTE = "(the image is behind the tool results)"
MOVED_CAPTION = "Images from the tool results above:"
DOCUMENT_NOTE = "(see the document)"

# Families, by the words of id and name: "us.anthropic.claude-opus-4-6-v1", "Claude Opus 4.6" → claude-opus-4-6.
_CLAUDE = re.compile(r"claude|anthropic")
_CLAUDE_ADAPTIVE = re.compile(r"\b(?:opus-4-[678]|sonnet-4-6|(?:opus|sonnet|haiku|fable)-5)\b")
_CLAUDE_BINDING = re.compile(r"\b(?:opus-4-[78]|(?:opus|sonnet|haiku|fable)-5)\b")
_CLAUDE_CACHING = re.compile(r"\b(?:claude-3-5-haiku|claude-3-7-sonnet|(?:opus|sonnet|haiku|fable)-[45])\b")
_NOVA_THINKING = re.compile(r"\bnova-2\b")
BINDING = {"block_binding": {"prefix_mismatch_behavior": "drop_block"}}
BINDING_BETA = "thinking-binding-controls-2026-08-01"
INTERLEAVED_BETA = "interleaved-thinking-2025-05-14"
_LOW_TO_HIGH = {"minimal": "low", "xhigh": "high", "max": "high"}
# Families besides Claude whose thinking can be told how hard: (words, levels they lack → the nearest, the fields).
BEDROCK_EFFORTS: Tuple[Tuple[re.Pattern[str], Mapping[str, str], Callable[[str], Dict[str, Any]]], ...] = (
    (re.compile(r"\bgpt-oss\b"), _LOW_TO_HIGH, lambda effort: {"reasoning_effort": effort}),
    (re.compile(r"\bopenai-gpt\b"), {"minimal": "low"}, lambda effort: {"reasoning": {"effort": effort}}),
    (_NOVA_THINKING, _LOW_TO_HIGH,
     lambda effort: {"reasoningConfig": {"type": "enabled", "maxReasoningEffort": effort}}))
# models.json samplingParams that Converse has a field of its own for; the others go to the model as they are
BEDROCK_SAMPLING = {"temperature": "temperature", "top_p": "topP", "max_tokens": "maxTokens"}


def model_words(model: Model) -> str:
    """The model's id and name in lower case with hyphens only, to look for a family in."""
    return re.sub(r"[^a-z0-9]+", "-", f"{model.id} {model.name}".lower())


def is_claude(model: Model) -> bool:
    """Whether Anthropic's rules hold for this model. An opaque ARN needs a `name` that says so."""
    return bool(_CLAUDE.search(model_words(model)))


class BedrockConverse(UpstreamProtocol):
    """Amazon Bedrock's Converse: POST {base}/model/{id}/converse or /converse-stream. Claude behind it keeps the rules
    of the Messages API. `build` leaves the call unsigned: a signature is good for five minutes."""

    name = "bedrock-converse-stream"
    stream_type = "application/vnd.amazon.eventstream"

    def marks_cache(self, model: Model) -> bool:
        """See `UpstreamProtocol.marks_cache`."""
        return bool(_CLAUDE_CACHING.search(model_words(model)))

    def carries(self, model: Model) -> FrozenSet[str]:
        """What Converse has a field for; top_k only for Claude, whose native field is known, and no sampling at all for
        Claude from 4.7 on, which refuses it."""
        fields = {"stop"}
        if model.flag("supportsTemperature", not _CLAUDE_BINDING.search(model_words(model))):
            fields |= {"temperature", "top_p", "top_k"} if is_claude(model) else {"temperature", "top_p"}
        if model.flag("supportsOutputFormat", True):
            fields.add("output")
        if model.reasoning:
            fields.add("reasoning")
        return frozenset(fields)

    def replays(self, part: Thinking, model: Model) -> bool:
        """What came from Bedrock; to Claude only if it is signed, to others only if it can be read."""
        return part.maker == self.name and bool(part.signature if is_claude(model) else part.text and not part.redacted)

    def fit(self, request: Request, model: Model) -> Tuple[Request, List[str]]:
        """Claude: as for the Messages API. Nova: no limits or sampling at high effort (vendor's rule)."""
        if is_claude(model):
            return AnthropicMessages().fit(request, as_anthropic(model))
        if self._effort(request, model) != "high" or not _NOVA_THINKING.search(model_words(model)):
            return request, []
        dropped = [name for name in ("temperature", "top_p", "max_tokens") if getattr(request, name) is not None]
        return replace(request, **dict.fromkeys(dropped)), dropped

    def needs_bytes(self, part: Union[Image, Document], model: Model) -> bool:
        """See `UpstreamProtocol.needs_bytes`."""
        return True

    def build(self, request: Request, model: Model, credential: Credential) -> Call:
        """See `UpstreamProtocol.build`."""
        region = bedrock_region(model.id, model.base_url, credential.parts)
        messages = converse_messages(request.messages, is_claude(model))
        system = [{"text": text.text} for text in request.system if text.text.strip()]
        if not messages:                        # a system prompt alone: Converse needs a user turn
            messages, system = [{"role": "user", "content": system or [{"text": BLANK_TURN}]}], []
        config, fields = self._limits(request, model, region)
        body = present(
            messages=messages, system=system or None, inferenceConfig=config or None,
            toolConfig=self._tools(request, model), additionalModelRequestFields=fields or None,
            outputConfig=self._format(request.output))
        if self.marks_cache(model) or credential.parts.get("force_cache"):
            mark_cache_points(body)
        verb = "converse-stream" if request.stream else "converse"
        url = (f"{move_to_region(model.base_url, region).rstrip('/')}/model/"
               f"{urllib.parse.quote(model.id, safe=_AWS_SAFE)}/{verb}")
        accept = self.stream_type if request.stream else "application/json"
        return Call("POST", url, self._headers(model, credential, accept), dumps(body).encode("ascii"))

    def _headers(self, model: Model, credential: Credential, accept: str) -> Dict[str, str]:
        headers = {name: value for name, value in authorization(model, credential).items()
                   if not _AWS_OWN.fullmatch(name)}
        return {**headers, "accept": accept}

    def sign(self, call: Call, credential: Credential, now: float) -> Call:
        """The call with a bearer token (kind api_key), a signature (kind aws), or nothing for a proxy that wants none
        (`parts` has skip_auth). `parts` of kind aws: access_key_id, secret_access_key, session_token, region."""
        if credential.parts.get("skip_auth"):
            return call
        if credential.token:
            return call._replace(headers={**call.headers, "authorization": f"Bearer {credential.token}"})
        model_id = urllib.parse.unquote(call.url.partition("/model/")[2].partition("/")[0])
        region = bedrock_region(model_id, call.url, credential.parts)
        return sign_v4(call, credential.parts, region, "bedrock", now)

    def _limits(self, request: Request, model: Model, region: str) -> Tuple[Dict[str, Any], Dict[str, Any]]:
        """inferenceConfig and additionalModelRequestFields. Claude's default limit is low, hence the model's own."""
        limit, fields = request.max_tokens, self._reasoning(request, model)
        if is_claude(model):
            limit = limit or model.max_tokens or None
            thinking, limit = self._claude(request, model, limit, region)
            fields = {**thinking, **present(top_k=request.top_k)}
        config = present(maxTokens=limit, topP=request.top_p, stopSequences=[s for s in request.stop if s] or None,
                         temperature=None if request.temperature is None else min(request.temperature, 1))
        for name, value in model.sampling.items():
            (config if name in BEDROCK_SAMPLING else fields)[BEDROCK_SAMPLING.get(name, name)] = value
        return config, fields

    def _claude(self, request: Request, model: Model, limit: Optional[int], region: str,
                ) -> Tuple[Dict[str, Any], Optional[int]]:
        """The Messages API's thinking fields, with what Bedrock wants besides, and the output limit that goes with
        them."""
        as_asked = AnthropicMessages().thinking(request, as_anthropic(model), limit or DEFAULT_MAX_TOKENS)
        thinking, effort, total = as_asked
        if thinking is None or (thinking["type"] == "disabled" and not _CLAUDE_ADAPTIVE.search(model_words(model))):
            return {}, limit                    # older models do not think unless told to
        if thinking["type"] == "disabled":
            return {"thinking": thinking}, limit
        fields: Dict[str, Any] = {"thinking": {**thinking, "display": "summarized"}}
        if effort:
            fields["output_config"] = {"effort": effort}
        else:
            fields["anthropic_beta"], limit = [INTERLEAVED_BETA], total
        if model.id.startswith(("us-gov.", "arn:aws-us-gov:")) or region.startswith("us-gov-"):
            del fields["thinking"]["display"]   # GovCloud knows neither this nor the binding
        elif _CLAUDE_BINDING.search(model_words(model)):
            fields["thinking"].update(BINDING)
            fields["anthropic_beta"] = [BINDING_BETA]
        return fields, limit

    def _effort(self, request: Request, model: Model) -> Optional[str]:
        """The effort word for a model that is not Claude, None when there is nothing to say."""
        level = fit_level(request.reasoning.level, model) if request.reasoning else None
        lacks = next((lacks for words, lacks, _ in BEDROCK_EFFORTS if words.search(model_words(model))), None)
        if lacks is None or level in (None, "off"):
            return None
        word = model.thinking_levels.get(level) or level
        return lacks.get(word, word)

    def _reasoning(self, request: Request, model: Model) -> Dict[str, Any]:
        effort = self._effort(request, model)
        fields = next((fields for words, _, fields in BEDROCK_EFFORTS if words.search(model_words(model))), None)
        return fields(effort) if fields and effort else {}

    def _tools(self, request: Request, model: Model) -> Optional[Dict[str, Any]]:
        """toolConfig. Converse has no choice "none", and refuses a conversation with tool traffic but without tools."""
        used = dict.fromkeys(part.name for message in request.messages for part in message.parts
                             if isinstance(part, ToolCall))
        choice = request.tool_choice
        if not used and (not request.tools or (choice and choice.kind == "none")):
            return None
        tools = request.tools or [Tool(name, "No longer available; do not call it.") for name in used]
        config: Dict[str, Any] = {"tools": [self._tool(tool, model) for tool in tools]}
        if choice and request.tools and choice.kind in BEDROCK_CHOICES:
            config["toolChoice"] = BEDROCK_CHOICES[choice.kind](choice)
        return config

    def _tool(self, tool: Tool, model: Model) -> Dict[str, Any]:
        strict = True if tool.strict and model.flag("supportsStrictMode") else None
        return {"toolSpec": present(name=tool.name, description=tool.description or None, strict=strict,
                                    inputSchema={"json": {"type": "object", **tool.schema}})}

    def _format(self, output: Optional[OutputFormat]) -> Optional[Dict[str, Any]]:
        if output is None or output.schema is None:
            return None
        schema = {"schema": json_text(clean_strings(output.schema)), "name": output.name}
        return {"textFormat": {"type": "json_schema", "structure": {"jsonSchema": schema}}}

    def reader(self, model: Model, stamp: Stamp) -> Reader:
        """See `UpstreamProtocol.reader`."""
        return ConverseReader()

    def parse_error(self, status: int, headers: Mapping[str, str], body: bytes, now: float) -> GatewayError:
        """See `UpstreamProtocol.parse_error`: `x-amzn-errortype` says what it is, else the body."""
        message, kind, code = error_fields(body)
        try:
            data = as_dict(json.loads(body))
        except (ValueError, RecursionError):
            data = {}
        if isinstance(data.get("Message"), str):
            message = data["Message"][:MAX_MESSAGE_CHARS]
        kind = headers.get("x-amzn-errortype") or data.get("__type") or kind or code
        return bedrock_error(str(kind), message or f"the provider answered {status} without a message", status,
                             parse_retry_after(headers, now))


def as_anthropic(model: Model) -> Model:
    """The model with the compat flag by which the Messages API's rules tell its two kinds of thinking apart."""
    is_adaptive = bool(_CLAUDE_ADAPTIVE.search(model_words(model)))
    return replace(model, compat={"forceAdaptiveThinking": is_adaptive, **model.compat})


def bedrock_error(kind: str, message: str, status: int = 500, retry_after: Optional[float] = None) -> GatewayError:
    """The error that an exception's name ("ValidationException:http://…", "aws.protocol#ThrottlingException") and its
    message amount to; `status` counts when the name is unknown."""
    name = re.sub("exception$", "", kind.partition(":")[0].rpartition("#")[2].strip().lower())
    status = BEDROCK_STATUS.get(name, 500 if status == 424 else status)
    if "too many tokens" in message.lower() and "wait" in message.lower():
        status = 429                            # "Too many tokens, please wait" speaks of the pace, not of the prompt
    return upstream_error(status, message, retry_after=retry_after)


# --- bedrock-converse-stream: messages --------------------------------------------------------------------------------


def converse_messages(messages: Iterable[Message], signs: bool) -> List[Dict[str, Any]]:
    """Turns that alternate and begin with the user; all results of a tool turn are in one user turn, and what cannot
    stand inside an error result is behind them. `signs`: thinking goes back with its signature."""
    out: List[Dict[str, Any]] = []
    for message in messages:
        role = "assistant" if message.role == "assistant" else "user"
        blocks = [block for part in message.parts for block in converse_blocks(part, signs)]
        blocks.extend(moved_blocks(message.parts, signs))
        if not blocks and role == "user":
            blocks = [{"text": BLANK_TURN}]
        if blocks and out and out[-1]["role"] == role:
            out[-1]["content"].extend(blocks)
        elif blocks:
            out.append({"role": role, "content": blocks})
    if out and out[0]["role"] == "assistant":
        out.insert(0, {"role": "user", "content": [{"text": BLANK_TURN}]})
    name_documents(out)
    return out


def converse_blocks(part: Part, signs: bool) -> List[Dict[str, Any]]:
    """The content blocks of a part."""
    if isinstance(part, Text):
        return [{"text": part.text}] if part.text.strip() else []
    if isinstance(part, Thinking):
        if part.redacted:
            return [{"reasoningContent": {"redactedContent": part.signature}}]
        return [{"reasoningContent": {"reasoningText": present(text=part.text,
                                                               signature=part.signature if signs else None)}}]
    if isinstance(part, ToolCall):
        arguments = repair_json_object(part.arguments)
        arguments = {"malformed_arguments": part.arguments} if arguments is None else without_empty_keys(arguments)
        return [{"toolUse": {"toolUseId": fit_id(part.id, 64), "name": part.name, "input": arguments}}]
    if isinstance(part, ToolResult):
        return [converse_result(part, signs)]
    return [converse_media(part)]


def converse_result(result: ToolResult, signs: bool) -> Dict[str, Any]:
    """A toolResult block; an error result holds text only (Claude refuses more)."""
    kept = [part for part in result.parts if isinstance(part, Text) or not result.is_error]
    blocks = [block for part in kept for block in converse_blocks(part, signs)]
    note = MOVED_NOTE if len(kept) < len(result.parts) else EMPTY_RESULT
    return {"toolResult": present(toolUseId=fit_id(result.call_id, 64), content=blocks or [{"text": note}],
                                  status="error" if result.is_error else None)}


def moved_blocks(parts: Iterable[Part], signs: bool) -> List[Dict[str, Any]]:
    """A caption and the images and documents of the error results among `parts`, [] when there are none."""
    moved = [part for result in parts if isinstance(result, ToolResult) and result.is_error
             for part in result.parts if not isinstance(part, Text)]
    blocks = [block for part in moved for block in converse_blocks(part, signs)]
    return [{"text": MOVED_CAPTION}, *blocks] if blocks else []


def converse_media(part: Union[Image, Document]) -> Dict[str, Any]:
    """An image or document block. Raises `BadRequest` for a URL or a format that Converse does not take."""
    kind, formats = ("image", BEDROCK_IMAGES) if isinstance(part, Image) else ("document", BEDROCK_DOCUMENTS)
    if part.data is None:
        raise BadRequest(f"this model takes no {kind} by URL; send its bytes", code="unsupported_parameter",
                         param="messages")
    media_type = part.media_type.partition(";")[0].strip().lower()
    if media_type not in formats:
        raise BadRequest(f"this model takes no {kind} of type {media_type}; it takes {', '.join(formats)}",
                         code="unsupported_parameter", param="messages")
    block = {"format": formats[media_type], "source": {"bytes": part.data}}
    return {kind: block if isinstance(part, Image) else {**block, "name": part.name or "document"}}


def name_documents(messages: Iterable[Dict[str, Any]]) -> None:
    """Gives each document a name that Converse takes and no other has, and each turn with a document some text."""
    names: set[str] = set()
    for message in messages:
        content = message["content"]
        inner = [block for result in content for block in result.get("toolResult", {}).get("content", ())]
        for block in (*content, *inner):
            if "document" in block:
                block["document"]["name"] = fresh_name(block["document"]["name"], names)
        if any("document" in block for block in content) and not any("text" in block for block in content):
            content.append({"text": DOCUMENT_NOTE})


def fresh_name(name: str, taken: set[str]) -> str:
    """`name` in letters, digits, single blanks, hyphens and brackets, numbered when it is in `taken`; added there."""
    base = " ".join(re.sub(r"[^A-Za-z0-9()\[\]-]", " ", name).split())[:180] or "document"
    fresh, count = base, 1
    while fresh in taken:
        count += 1
        fresh = f"{base}-{count}"
    taken.add(fresh)
    return fresh


def without_empty_keys(value: Any) -> Any:
    """A JSON value without members whose name is "", which Bedrock refuses at any depth."""
    if isinstance(value, dict):
        return {key: without_empty_keys(item) for key, item in value.items() if key}
    return [without_empty_keys(item) for item in value] if isinstance(value, list) else value


def mark_cache_points(body: Dict[str, Any]) -> None:
    """Cache points behind what stays the same from turn to turn: the system prompt, and the last turn if the user's."""
    last = body["messages"][-1]
    for blocks in (body.get("system"), last["content"] if last["role"] == "user" else None):
        if blocks:
            blocks.append({"cachePoint": {"type": "default"}})


# --- bedrock-converse-stream: answers ---------------------------------------------------------------------------------


class ConverseReader(Reader):
    """Converse frames → events. Text and thinking have no start of their own; usage comes behind messageStop, in
    metadata, and ends the answer."""

    def __init__(self) -> None:
        super().__init__()
        self._decoder = EventStreamDecoder()
        self._started = False
        self._signatures: Dict[Any, str] = {}
        self._redacted: Dict[Any, bytes] = {}
        self._stop: Optional[str] = None
        self._usage: Optional[Usage] = None

    def feed(self, data: bytes) -> Iterator[Event]:
        """See `Reader.feed`."""
        for headers, payload in self._decoder.feed(data):
            yield from self.on_message(headers, payload)

    def end(self) -> Iterator[Event]:
        """See `Reader.end`."""
        if self._decoder.pending:
            raise UpstreamProtocolError("the provider's stream was cut in the middle of a frame")
        yield from self.finish()

    def on_message(self, headers: Mapping[str, Any], payload: bytes) -> Iterator[Event]:
        """One frame: an event, an exception of the model, or an error of the service."""
        kind = headers.get(":message-type")
        if kind == "error":
            raise bedrock_error(str(headers.get(":error-code", "")), str(headers.get(":error-message")
                                                                        or "the provider reported an error"))
        if kind == "exception":
            data = as_dict(loads(payload.decode("utf-8"))) if payload else {}
            said = [text for text in (data.get("message") or data.get("Message"), data.get("originalMessage")) if text]
            raise bedrock_error(str(headers.get(":exception-type", "")),
                                ": ".join(dict.fromkeys(map(str, said))) or "the provider reported an error")
        handler = self.handlers.get(headers.get(":event-type", ""))
        if handler:
            yield from handler(self, loads(payload.decode("utf-8")))

    def finish(self) -> Iterator[Event]:
        """The end without metadata is fine, without messageStop it is a cut."""
        if self._stop is None:
            raise UpstreamProtocolError("the provider's stream ended before messageStop")
        yield from self._done()

    def whole(self, body: Dict[str, Any]) -> Iterator[Event]:
        """A Converse answer: the same as its events."""
        content = as_dict(as_dict(body.get("output")).get("message")).get("content")
        if not isinstance(content, list):
            raise UpstreamProtocolError("the provider's answer has no content")
        yield from self._message_start({})
        for index, block in enumerate(content):
            if "toolUse" in block:
                yield from self._block_start({"contentBlockIndex": index, "start": block})
            for delta in block_deltas(block):
                yield from self._block_delta({"contentBlockIndex": index, "delta": delta})
            yield from self._block_stop({"contentBlockIndex": index})
        yield from self._message_stop({"stopReason": body.get("stopReason") or "end_turn"})
        yield from self._metadata(body)

    def _message_start(self, data: Dict[str, Any]) -> Iterator[Event]:
        if not self._started:
            self._started = True
            yield Start()

    def _block_start(self, data: Dict[str, Any]) -> Iterator[Event]:
        call = as_dict(data.get("start")).get("toolUse")
        if call:
            yield from self._message_start({})
            yield self._parts.start(data["contentBlockIndex"], ToolCall(call["toolUseId"], call["name"]))

    def _block_delta(self, data: Dict[str, Any]) -> Iterator[Event]:
        key, delta = data["contentBlockIndex"], data["delta"]
        yield from self._message_start({})
        if delta.get("text"):
            yield from self._write(key, Text(), delta["text"])
        elif as_dict(delta.get("toolUse")).get("input"):
            yield self._parts.delta(key, delta["toolUse"]["input"])
        elif isinstance(delta.get("reasoningContent"), dict):
            yield from self._reasoning(key, delta["reasoningContent"])

    def _reasoning(self, key: Any, delta: Dict[str, Any]) -> Iterator[Event]:
        if delta.get("redactedContent"):        # in pieces, each padded: joined as bytes, shown at the end of the block
            self._redacted[key] = self._redacted.get(key, b"") + base64.b64decode(delta["redactedContent"])
        if delta.get("text") or delta.get("signature"):
            yield from self._write(key, Thinking(maker=BedrockConverse.name), delta.get("text") or "")
        if delta.get("signature"):
            self._signatures[key] = self._signatures.get(key, "") + delta["signature"]

    def _write(self, key: Any, part: Part, text: str) -> Iterator[Event]:
        if key not in self._parts:
            yield self._parts.start(key, part)
        if text:
            yield self._parts.delta(key, text)

    def _block_stop(self, data: Dict[str, Any]) -> Iterator[Event]:
        key = data["contentBlockIndex"]
        if key in self._parts:
            yield self._parts.end(key, self._signatures.pop(key, None))
        if key in self._redacted:
            sealed = base64.b64encode(self._redacted.pop(key)).decode("ascii")
            yield self._parts.start(key, Thinking("", sealed, True, BedrockConverse.name))
            yield self._parts.end(key)

    def _message_stop(self, data: Dict[str, Any]) -> Iterator[Event]:
        reason = data["stopReason"]
        if reason in BEDROCK_FAILURES:
            raise UpstreamError(f"the provider stopped: {reason}")
        for key in [*self._signatures, *self._redacted]:
            yield from self._block_stop({"contentBlockIndex": key})
        yield from self._parts.end_all()
        self._stop = BEDROCK_STOP.get(reason, "stop")
        if self._usage is not None:
            yield from self._done()

    def _metadata(self, data: Dict[str, Any]) -> Iterator[Event]:
        self._usage = read_converse_usage(as_dict(data.get("usage")))
        if self._stop is not None:
            yield from self._done()

    def _done(self) -> Iterator[Event]:
        yield from self._message_start({})
        yield Done(self._stop or "stop", self._usage or Usage())

    handlers: Mapping[str, Callable[..., Iterator[Event]]] = {
        "messageStart": _message_start, "contentBlockStart": _block_start, "contentBlockDelta": _block_delta,
        "contentBlockStop": _block_stop, "messageStop": _message_stop, "metadata": _metadata}


def block_deltas(block: Mapping[str, Any]) -> Iterator[Dict[str, Any]]:
    """A whole answer's content block as the deltas that a stream would have sent for it."""
    reasoning = as_dict(block.get("reasoningContent"))
    thought = as_dict(reasoning.get("reasoningText"))
    yield {"text": block.get("text")}
    for piece in as_dict(block.get("citationsContent")).get("content") or ():
        yield {"text": as_dict(piece).get("text")}
    yield {"reasoningContent": {"redactedContent": reasoning.get("redactedContent"), **thought}}
    arguments = as_dict(block.get("toolUse")).get("input")
    yield {"toolUse": {"input": json_text(arguments) if arguments else ""}}


def read_converse_usage(usage: Dict[str, Any]) -> Usage:
    """Converse's usage: inputTokens already excludes what the cache gave or took."""
    hour = sum(token_count(as_dict(item).get("inputTokens")) for item in usage.get("cacheDetails") or ()
               if as_dict(item).get("ttl") == "1h")
    return Usage(token_count(usage.get("inputTokens")), token_count(usage.get("outputTokens")),
                 token_count(usage.get("cacheReadInputTokens")), token_count(usage.get("cacheWriteInputTokens")), 0,
                 hour)


# --- bedrock-converse-stream: model lists -----------------------------------------------------------------------------

BEDROCK_LISTS = {"foundation-models": {"byOutputModality": "TEXT"},
                 "inference-profiles": {"type": "SYSTEM_DEFINED", "maxResults": "1000"}}


def bedrock_list_call(kind: str, model: Model, credential: Credential, next_token: str = "") -> Call:
    """The call, to be signed, that lists what `kind` of `BEDROCK_LISTS` names; profiles come in pages, each with the
    `nextToken` of the next. `model` gives base URL and headers."""
    region = bedrock_region("", model.base_url, credential.parts)
    url = move_to_region(model.base_url.replace("//bedrock-runtime", "//bedrock", 1), region).rstrip("/")
    query = {**BEDROCK_LISTS[kind], **({"nextToken": next_token} if next_token else {})}
    headers = {name: value for name, value in authorization(model, credential).items() if not _AWS_OWN.fullmatch(name)}
    return Call("GET", f"{url}/{kind}?{urllib.parse.urlencode(query, quote_via=urllib.parse.quote)}", headers)


def read_bedrock_models(foundation: Mapping[str, Any], profiles: Mapping[str, Any], provider: Provider,
                        ) -> Dict[str, Model]:
    """The models in the answers to the two lists, by the id to call them by: foundation models that can be called on
    demand, and profiles of foundation models. Those that cannot stream are left out."""
    known = {item["modelId"]: item for item in foundation.get("modelSummaries") or ()
             if isinstance(item, dict) and item.get("responseStreamingSupported") is not False}
    models = {model_id: _listed_model(provider, model_id, item.get("modelName"), item) for model_id, item in known.items()
              if "ON_DEMAND" in item.get("inferenceTypesSupported", ("ON_DEMAND",))}
    for profile in profiles.get("inferenceProfileSummaries") or ():
        arns = [str(as_dict(part).get("modelArn")) for part in profile.get("models") or ()]
        ids = [arn.rpartition("foundation-model/")[2] for arn in arns]
        item = next((known[model_id] for model_id in ids if model_id in known), None)
        if item and profile.get("status", "ACTIVE") == "ACTIVE":
            profile_id = profile["inferenceProfileId"]
            models[profile_id] = _listed_model(provider, profile_id, profile.get("inferenceProfileName"), item)
    return models


def _listed_model(provider: Provider, model_id: str, name: Any, item: Mapping[str, Any]) -> Model:
    modalities = item.get("inputModalities")
    return unlisted_model(provider, model_id, name=name or "",
                          input=tuple(str(word).lower() for word in modalities) if modalities else None)


UPSTREAM_PROTOCOLS: Dict[str, UpstreamProtocol] = {protocol.name: protocol for protocol in (
    OpenAICompletions(), AnthropicMessages(), OpenAIResponses(), AzureResponses(), CodexResponses(), GoogleGenerativeAI(),
    GoogleVertex(), CloudCodeAssist(), MistralConversations(), BedrockConverse())}


# Headers that tell a host what kind of request it gets, by the row's `requestHeaders` flag.
REQUEST_HEADERS: Dict[str, Callable[[Request], Dict[str, str]]] = {"copilot": copilot_headers}


def request_headers(request: Request, model: Model) -> Dict[str, str]:
    """What the model's row wants every call to say about its request."""
    name = model.flag("requestHeaders")
    return REQUEST_HEADERS[name](request) if name in REQUEST_HEADERS else {}


# --- Embeddings -------------------------------------------------------------------------------------------------------


class Embedder:
    """How the hosts of a wire format embed texts. Most do it as OpenAI does: the client's fields pass as they are."""

    lane = "native"
    takes_tokens = True

    def fields(self, data: Mapping[str, Any]) -> Tuple[Dict[str, Any], List[str]]:
        """The client's fields as the host calls them, and the names of those that it has none for."""
        return dict(data), []

    def build(self, upstream: Any, fields: Dict[str, Any], request: Request, model: Model,
              credential: Credential) -> Call:
        """The call that asks for the embeddings of `request`."""
        call: Call = upstream.relay("/embeddings", {**fields, "model": model.id}, request, model, credential)
        return call._replace(headers={**carried_headers(request), **call.headers})

    def read(self, data: Dict[str, Any]) -> Dict[str, Any]:
        """The host's answer in OpenAI's shape."""
        return data


class MistralEmbedder(Embedder):
    """Mistral: close to OpenAI's, but texts only, another name for the dimensions, and unknown fields are refused."""

    lane = "translated"
    takes_tokens = False
    names: Mapping[str, str] = {
        "model": "model", "input": "input", "encoding_format": "encoding_format", "dimensions": "output_dimension",
        "output_dimension": "output_dimension", "output_dtype": "output_dtype", "metadata": "metadata"}

    def fields(self, data: Mapping[str, Any]) -> Tuple[Dict[str, Any], List[str]]:
        """See `Embedder.fields`."""
        said = present(**data)
        return ({self.names[name]: value for name, value in said.items() if name in self.names},
                [name for name in said if name not in self.names])

    def build(self, upstream: Any, fields: Dict[str, Any], request: Request, model: Model,
              credential: Credential) -> Call:
        """See `Embedder.build`."""
        headers = authorization(model, credential, model.flag("auth", "bearer"))
        body = dumps({**fields, "model": model.id}).encode("ascii")
        return Call("POST", join_url(model.base_url, "/v1/embeddings"), headers, body)


class GeminiEmbedder(MistralEmbedder):
    """Gemini: :embedContent for one text, :batchEmbedContents for several. Their numbers have one form only, and older
    models tell no usage."""

    names = {"model": "model", "input": "input", "encoding_format": "", "dimensions": "outputDimensionality",
             "task_type": "taskType", "title": "title"}

    def build(self, upstream: Any, fields: Dict[str, Any], request: Request, model: Model,
              credential: Credential) -> Call:
        """See `Embedder.build`."""
        given, name = request.data["input"], gemini_name(model.id)
        options = {own: value for own, value in fields.items() if own not in ("model", "input", "")}
        asked = [{"model": name, "content": {"parts": [{"text": text}]}, **options}
                 for text in texts_or_tokens(request.data, "input")]
        method, body = ((":embedContent", asked[0]) if isinstance(given, str) else
                        (":batchEmbedContents", {"requests": asked}))
        return Call("POST", gemini_url(model, method), upstream.headers(model, credential), dumps(body).encode("ascii"))

    def read(self, data: Dict[str, Any]) -> Dict[str, Any]:
        """See `Embedder.read`."""
        if data.get("error"):
            return data
        items = data["embeddings"] if "embeddings" in data else [data["embedding"]]
        read = read_gemini_usage(as_dict(data.get("usageMetadata"))).prompt
        return {"data": [{"embedding": item["values"]} for item in items],
                "usage": {"prompt_tokens": read, "total_tokens": read}}


EMBEDDERS: Dict[str, Embedder] = {
    OpenAICompletions.name: Embedder(), OpenAIResponses.name: Embedder(), AzureResponses.name: Embedder(),
    MistralConversations.name: MistralEmbedder(), GoogleGenerativeAI.name: GeminiEmbedder()}


def is_vector(value: Any) -> bool:
    """Whether it is a row of numbers."""
    return isinstance(value, list) and bool(value) and set(map(type, value)) <= {int, float}


def as_floats(vector: Any) -> List[Any]:
    """An embedding as numbers. Raises ValueError or TypeError when it is none."""
    if is_vector(vector):
        return vector
    raw = base64.b64decode(vector, validate=True)
    if not raw or len(raw) % 4:
        raise ValueError("not a row of 32-bit numbers")
    return list(struct.unpack(f"<{len(raw) // 4}f", raw))


def as_base64(vector: Any) -> str:
    """An embedding as base64 of little-endian 32-bit numbers. Raises TypeError, OverflowError or struct.error."""
    if isinstance(vector, str) and vector:
        return vector
    if not is_vector(vector):
        raise TypeError("not a row of numbers")
    return base64.b64encode(struct.pack(f"<{len(vector)}f", *vector)).decode("ascii")


# --- Lanes ------------------------------------------------------------------------------------------------------------


class Lane:
    """One request's way: the call that goes out, and the provider's bytes made the client's, streamed or whole.

    `feed`, `end` and `whole` return what is to be sent; for a client that does not stream, the one that finishes returns
    the whole body. `started`: there is something to show. `error`: the answer failed; before `started` it becomes an
    HTTP status, after it the returned bytes already tell the client."""

    name = ""
    limit_bytes = MAX_EVENT_BYTES           # of a whole answer

    def __init__(self, client: ClientProtocol, upstream: UpstreamProtocol, request: Request, model: Model,
                 stamp: Stamp) -> None:
        self.client = client
        self.upstream: Any = upstream           # a native lane knows which one it is
        self.request = request
        self.model = model
        self.stamp = stamp
        self.started = False
        self.finished = False
        self.error: Optional[GatewayError] = None
        self.usage = Usage()
        self.stop_reason = ""
        self.heard = 0                          # events that say something, so no comments or pings
        self.secrets: Sequence[str] = ()        # what a provider may not quote to the client
        self.is_passed = False                  # whether the credential is the client's own
        self.origin = ""                        # whose signatures the answer holds
        self.tool_names: Mapping[str, str] = {}     # as sent → the client's own, where they differ
        self.signed_calls: List[ToolCall] = []  # calls whose seal the client's protocol may have no place for
        self.issued: List[str] = []             # signatures that the client is given

    def call(self, credential: Credential) -> Tuple[Call, List[str]]:
        """The call, and the client's names of what it leaves out."""
        raise NotImplementedError

    def feed(self, data: bytes) -> bytes:
        """Takes a piece of an event stream."""
        raise NotImplementedError

    def end(self) -> bytes:
        """Takes the regular end of an event stream."""
        raise NotImplementedError

    def whole(self, body: bytes) -> bytes:
        """Takes a whole JSON answer."""
        raise NotImplementedError

    def again(self, kind: Optional[Type[Lane]] = None, request: Optional[Request] = None) -> Lane:
        """The same request, or a changed one, from its beginning, on the same lane or another."""
        lane = (kind or type(self))(self.client, self.upstream, request or self.request, self.model, self.stamp)
        lane.secrets, lane.origin, lane.tool_names = self.secrets, self.origin, self.tool_names
        return lane

    def fail(self, error: GatewayError) -> bytes:
        """Takes a failure of the connection; b"" when the answer was complete before."""
        if self.finished:
            return b""
        self.finished, self.error = True, error
        error.hide(self.secrets)
        return self.client.error_event(error, self.stamp.request_id)


class TranslatedLane(Lane):
    """Through the representation, between any two protocols."""

    name = "translated"

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self._reader = Settled(self.upstream.reader(self.model, self.stamp))
        self._writer = self.client.writer(self.request, self.stamp)
        self._events: List[Event] = []
        # Where servers see to it that arguments are sound, a client that streams may have them as they grow.
        holds_calls = self.client.wants_objects and (self.upstream.is_lax or not self.request.stream)
        self._sound = SoundCalls() if holds_calls else None

    def call(self, credential: Credential) -> Tuple[Call, List[str]]:
        """See `Lane.call`."""
        names = self.client.field_names
        self.tool_names = self.upstream.tool_names(self.request, credential)
        request = rename_tools(self.request, self.tool_names)
        request, dropped = normalise(request, self.model, self.upstream, names)
        request, conflicts = self.upstream.fit(request, self.model)
        dropped.extend(names.get(name, name) for name in conflicts)
        return self.upstream.build(request, self.model, credential), dropped

    def feed(self, data: bytes) -> bytes:
        """See `Lane.feed`."""
        return self._take(self._reader.feed(data))

    def end(self) -> bytes:
        """See `Lane.end`."""
        return self._take(self._reader.end())

    def fail(self, error: GatewayError) -> bytes:
        """See `Lane.fail`."""
        return self._take(self._reader.fail(error))

    def whole(self, body: bytes) -> bytes:
        """See `Lane.whole`."""
        return self._take(self._reader.whole(parse_answer(body)))

    def _take(self, events: List[Event]) -> bytes:
        self.heard += len(events)
        self.started = self.started or not all(isinstance(event, (Start, Failed)) for event in events)
        events = [self._mark(event) if isinstance(event, (PartStart, PartEnd)) else event for event in events]
        if self._sound:
            events = self._sound.feed(events)
        for event in events:
            if isinstance(event, Failed):
                self.error = event.error
                self.error.hide(self.secrets)
            elif isinstance(event, Done):
                self.usage, self.stop_reason = event.usage, event.stop_reason
            elif isinstance(event, PartEnd) and isinstance(event.part, ToolCall) and event.part.signature:
                self.signed_calls.append(event.part)
        self.finished = self._reader.finished
        if self.request.stream:
            return self._writer.write(events)
        self._events.extend(events)
        if not self.finished or self.error:
            return b""
        reply = collect(self._events)
        return dumps(self.client.render(self.request, reply, self.stamp)).encode("ascii")

    def _mark(self, event: Union[PartStart, PartEnd]) -> Event:
        """The event with what the provider does not know of its part: the name by which the client knows the tool, and
        whose signature it is."""
        part = event.part
        if isinstance(part, ToolCall) and self.tool_names:
            part = replace(part, name=client_tool_name(part.name, self.tool_names))
        if isinstance(part, (Thinking, ToolCall)) and part.signature:
            part = replace(part, origin=self.origin)
            self.issued.append(part.signature)
        return event if part is event.part else event._replace(part=part)


def parse_answer(body: bytes) -> Dict[str, Any]:
    """A provider's whole answer as a dict. Raises `UpstreamProtocolError` when it is not one: an HTML page from a proxy,
    a cut body, nothing at all."""
    try:
        value = loads(body.decode("utf-8-sig"))
    except (ValueError, RecursionError):
        raise UpstreamProtocolError("the provider's answer is not JSON" if body.strip() else
                                    "the provider's answer is empty") from None
    if not isinstance(value, dict):
        raise UpstreamProtocolError("the provider's answer is not a JSON object")
    return value


class NativeLane(Lane):
    """Client and provider speak the same protocol: bodies pass as they are, and the gateway only reads along."""

    name = "native"

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self._splitter = EventSplitter()
        self._opened = False

    def feed(self, data: bytes) -> bytes:
        """See `Lane.feed`."""
        try:
            return self._relay(self._splitter.feed(data))
        except UpstreamProtocolError as error:
            return self.fail(error)

    def end(self) -> bytes:
        """See `Lane.end`."""
        out = self._relay(self._splitter.end())
        return out if self.finished else out + self._ended()

    def _ended(self) -> bytes:
        return self.fail(UpstreamProtocolError("the provider's stream ended without its last event"))

    def _relay(self, block: bytes) -> bytes:
        """The block's events for the client, up to the first that ends the stream."""
        out: List[bytes] = []
        if not block or self.finished:
            return b""
        try:
            for name, text in parse_events(block):
                self.heard += name != "ping"
                out.append(self.relay_event(name, text))
                if self.finished:
                    break
        except GatewayError as error:
            out.append(self.fail(error))
        except MALFORMED as error:
            log.debug("malformed provider event", exc_info=True)
            out.append(self.fail(UpstreamProtocolError(f"the provider's stream is malformed ({type(error).__name__})")))
        return b"".join(out)

    def relay_event(self, name: str, text: str) -> bytes:
        """One event for the client."""
        raise NotImplementedError

    def whole(self, body: bytes) -> bytes:
        """See `Lane.whole`."""
        try:
            return self.relay_whole(body, parse_answer(body))
        except MALFORMED as error:
            log.debug("malformed provider answer", exc_info=True)
            raise UpstreamProtocolError(f"the provider's answer is malformed ({type(error).__name__})") from None

    def relay_whole(self, body: bytes, data: Dict[str, Any]) -> bytes:
        """A whole answer, as bytes and parsed, for the client."""
        raise NotImplementedError


class AnthropicLane(NativeLane):
    """Anthropic to Anthropic: every event's data as it came; only the model's name is put back."""

    path = "/v1/messages"

    def call(self, credential: Credential) -> Tuple[Call, List[str]]:
        """The client's own bytes with the model's name put in and nothing else touched, unless the conversation holds
        thinking that this model did not make (after a change of model), or the credential or the model's name demand
        more."""
        request, model = self.request, self.model
        dropped: List[str] = []
        self.tool_names = self.upstream.tool_names(request, credential)
        has_foreign = bool(request.foreign) or any(
            isinstance(part, Thinking) and not self.upstream.replays(part, model)
            for message in request.messages for part in message.parts)
        first = as_dict(next(iter(system_blocks(request.data.get("system"))), None)).get("text")
        lacks_identity = credential.kind == "oauth" and not str(first).startswith(OAUTH_IDENTITY)
        has_stray = any(name in request.data for name in STRAY_FIELDS)
        if has_foreign or lacks_identity or has_stray or model.level or self.tool_names or has_repeated_keys(request.body):
            body = dumps(self._edited(has_foreign, lacks_identity, dropped)).encode("ascii")
        else:
            body = splice_model(request.body, request.data, model.id)
        headers = self.upstream.headers(model, credential, request.headers)
        query = f"?{request.query}" if credential.kind == "client" and request.query else ""
        return Call("POST", join_url(model.base_url, self.path) + query, headers, body), dropped

    def _edited(self, has_foreign: bool, lacks_identity: bool, dropped: List[str]) -> Dict[str, Any]:
        request, model = self.request, self.model
        data = {**request.data, "model": model.id}
        stray = [data.pop(name) for name in STRAY_FIELDS if name in data]
        if has_foreign:
            data["messages"] = [self._without_foreign(message) for message in data["messages"]]
            if as_dict(data.get("thinking")).get("type") == "enabled" and continues_unsigned(data["messages"]):
                del data["thinking"]
                dropped.append("thinking")
        if self.tool_names:
            data = rename_anthropic_tools(data, {own: name for name, own in self.tool_names.items()})
        if lacks_identity:
            data["system"] = [{"type": "text", "text": OAUTH_IDENTITY}, *system_blocks(data.get("system"))]
        if model.level or stray:
            thinking, effort, limit = self.upstream.thinking(request, model, request.max_tokens or DEFAULT_MAX_TOKENS)
            data.update(present(thinking=thinking, max_tokens=limit if request.max_tokens else None))
            if effort:
                data["output_config"] = {**as_dict(data.get("output_config")), "effort": effort}
        return data

    def _without_foreign(self, message: Dict[str, Any]) -> Dict[str, Any]:
        content = message.get("content")
        if not isinstance(content, list):
            return message
        kept = [block for block in content if block.get("type") not in ("thinking", "redacted_thinking")
                or all(self.upstream.replays(part, self.model) and part.signature not in self.request.foreign
                       for part in MESSAGES.content([block], "", Notes()))]
        return {**message, "content": kept or [{"type": "text", "text": "…"}]}

    def _read_along(self, name: str, data: Dict[str, Any]) -> bool:
        """Takes signatures from an event, and gives a tool its own name back; whether that changed the event."""
        if name == "content_block_delta":
            delta = as_dict(data.get("delta"))
            if delta.get("type") == "signature_delta" and isinstance(delta.get("signature"), str):
                self.issued.append(delta["signature"])
            return False
        return self._read_block(as_dict(data.get("content_block")))

    def _read_block(self, block: Dict[str, Any]) -> bool:
        self.issued.extend(detail_seals(block) if block.get("type") in ("thinking", "redacted_thinking") else ())
        if not self.tool_names or block.get("type") != "tool_use" or not isinstance(block.get("name"), str):
            return False
        name, block["name"] = block["name"], client_tool_name(block["name"], self.tool_names)
        return block["name"] != name

    def relay_event(self, name: str, text: str) -> bytes:
        """See `NativeLane.relay_event`."""
        data = loads(text)
        name = name or data["type"]             # SDKs skip events without a name
        if not isinstance(name, str) or not isinstance(data.get("type", ""), str):
            raise UpstreamProtocolError("the provider sent an event whose type is no text")
        opening = b""
        if name == "content_block_start" and not self._opened:      # see AnthropicReader
            opening = MESSAGES.writer(self.request, self.stamp).write([Start()])
        self._opened = self._opened or name in ("message_start", "content_block_start")
        if name in ("content_block_delta", "content_block_start") and self._read_along(name, data):
            text = dumps(data)
        if name == "message_start":
            self.usage = read_anthropic_usage(as_dict(data["message"].get("usage")))
            text = restore_model(text, data["message"].get("model"), self.request.model)
        elif name == "error":
            if not self.started:
                raise stream_error(data)
            hidden = redact_strings(data, self.secrets)
            text = text if hidden == data else dumps(hidden)
            self.finished, self.error = True, stream_error(hidden)
        elif name == "message_delta":
            usage = as_dict(data.get("usage"))
            later = read_anthropic_usage(usage)
            self.usage = Usage(*(new or old for new, old in zip(later, self.usage)))
            self.stop_reason = as_dict(data.get("delta")).get("stop_reason") or ""
        elif name == "message_stop":
            if is_empty(self.stop_reason, self.usage, self.started):
                raise EmptyAnswer("the provider's answer is empty")
            self.finished = True
        if name not in ("message_start", "message_delta", "ping"):
            self.started = True
        lines = "".join(f"data: {line}\n" for line in text.split("\n"))
        return opening + f"event: {name}\n{lines}\n".encode("utf-8")

    def relay_whole(self, body: bytes, data: Dict[str, Any]) -> bytes:
        """See `NativeLane.relay_whole`."""
        if not isinstance(data.get("content"), list):
            raise stream_error(data) if data.get("error") else UpstreamProtocolError(
                "the provider's answer has no content")
        if data.get("type") != "message" or not all(isinstance(as_dict(block).get("type"), str) for block in data["content"]):
            raise UpstreamProtocolError("the provider's answer is no message")
        self.usage = read_anthropic_usage(as_dict(data.get("usage")))
        self.stop_reason = data.get("stop_reason") or ""
        if is_empty(self.stop_reason, self.usage, bool(data["content"])):
            raise EmptyAnswer("the provider's answer is empty")
        self.started = self.finished = True
        if any([self._read_block(as_dict(block)) for block in data["content"]]):
            return dumps({**data, "model": self.request.model}).encode("ascii")
        return splice_model(body, data, self.request.model)


def continues_unsigned(messages: Sequence[Mapping[str, Any]]) -> bool:
    """Whether the conversation ends inside a tool loop whose turn does not begin with signed thinking: with a thinking
    budget, that is a 400."""
    last = as_dict(messages[-1]).get("content") if messages else None
    if not isinstance(last, list) or not any(as_dict(block).get("type") == "tool_result" for block in last):
        return False
    turn = next((message.get("content") for message in reversed(messages) if message.get("role") == "assistant"), None)
    first = as_dict(turn[0]).get("type") if isinstance(turn, list) and turn else None
    return first not in ("thinking", "redacted_thinking")


def rename_anthropic_tools(data: Dict[str, Any], names: Mapping[str, str]) -> Dict[str, Any]:
    """A Messages body with tools renamed in their declarations, in the choice and in earlier calls."""
    def rename(item: Any) -> Any:
        name = as_dict(item).get("name")
        return {**item, "name": names[name]} if isinstance(name, str) and name in names else item

    def rename_calls(message: Dict[str, Any]) -> Dict[str, Any]:
        content = message.get("content")
        if message.get("role") != "assistant" or not isinstance(content, list):
            return message
        return {**message, "content": [rename(block) if block.get("type") == "tool_use" else block for block in content]}

    return {**data, "tools": [rename(tool) for tool in data["tools"]], "messages": list(map(rename_calls, data["messages"])),
            **({"tool_choice": rename(data["tool_choice"])} if data.get("tool_choice") else {})}


class CountLane(AnthropicLane):
    """count_tokens at a provider that has it."""

    path = "/v1/messages/count_tokens"

    def relay_whole(self, body: bytes, data: Dict[str, Any]) -> bytes:
        """See `NativeLane.relay_whole`."""
        if not isinstance(data.get("input_tokens"), int):
            raise UpstreamProtocolError("the provider's answer has no input_tokens")
        self.started = self.finished = True
        return body


def restore_model(text: str, provider_name: Any, client_name: str) -> str:
    """The event's JSON text with the model named as the client named it."""
    if not isinstance(provider_name, str) or provider_name == client_name:
        return text
    pattern = r'("model"\s*:\s*)(?:' + "|".join(re.escape(encode(provider_name)) for encode in (dumps, json_text)) + ")"
    return re.sub(pattern, lambda match: match.group(1) + dumps(client_name), text, count=1)


class ChatLane(NativeLane):
    """OpenAI Chat to OpenAI-compatible: field-exact. Fields pass as they are, also those that only this host knows; what
    clients rely on and hosts get wrong is put right: one id, the model's name, role first, tool ids and names once, one
    finish reason, usage as the client asked, [DONE] last."""

    chunk_type, whole_type = "chat.completion.chunk", "chat.completion"
    make_id = staticmethod(chat_id)

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self._envelope: Dict[str, Any] = {}
        self._roles: set[int] = set()
        self._calls: Dict[Tuple[int, int], Dict[str, Any]] = {}
        self._newest: Dict[Tuple[int, Any], int] = {}
        self._call_ids = CallIds(self.stamp)
        self._mender = Mender()
        self._finished_choices: set[int] = set()
        self._raw_usage: Optional[Dict[str, Any]] = None

    def call(self, credential: Credential) -> Tuple[Call, List[str]]:
        """The client's own body, field for field, edited only where a compat flag demands it."""
        request, model = self.request, self.model
        body = {**request.data, "model": model.id}
        if request.foreign or _SEAL.encode("ascii") in request.body:
            body["messages"] = [without_details(message, request.foreign) for message in body["messages"]]
        reasoning = request.reasoning if model.reasoning is not None or model.level else None
        if reasoning:                           # the host's own way of saying it replaces the client's
            for name in CHAT.reasoning(body)[1]:
                del body[name]
        body, dropped = self.upstream.adapt(body, reasoning, model)
        call = self.upstream.post(body, request, model, credential)
        return call._replace(headers={**carried_headers(request), **call.headers}), dropped

    def relay_event(self, name: str, text: str) -> bytes:
        """See `NativeLane.relay_event`."""
        if text.strip() == "[DONE]":
            return self._finish()
        chunk = loads(text)
        if not isinstance(chunk, dict):
            raise UpstreamProtocolError("the provider sent an event that is not an object")
        if chunk.get("error"):
            raise stream_error(chunk)
        if not self._envelope:
            self._envelope = {"id": self.make_id(chunk.get("id") or "", self.stamp), "object": self.chunk_type,
                              "created": chunk.get("created") or self.stamp.created, "model": self.request.model,
                              "system_fingerprint": chunk.get("system_fingerprint") or FINGERPRINT}
        usage = chunk.pop("usage", None)
        choices = [choice for choice in chunk.get("choices") or () if isinstance(choice, dict)]
        usage = usage or next((choice.pop("usage") for choice in choices if choice.get("usage")), None)
        if isinstance(usage, dict):
            self._raw_usage = usage
        kept = [choice for choice in choices if self._mend_choice(choice)]
        if not kept:
            return b""
        return self._event({**chunk, **self._envelope, "choices": kept}, None)

    def _event(self, chunk: Dict[str, Any], usage: Optional[Dict[str, Any]]) -> bytes:
        if self.request.include_usage:
            chunk["usage"] = usage
        return sse(chunk)

    def _mend_choice(self, choice: Dict[str, Any]) -> bool:
        """Puts one choice of a chunk right, in place; whether anything is left to send."""
        index = choice.setdefault("index", 0)
        delta = choice["delta"] = as_dict(choice.get("delta"))
        reason = choice.setdefault("finish_reason", None)
        if reason in CHAT_FAILURES:
            raise UpstreamError(f"the provider stopped: {reason}")
        self._mend_delta(index, delta)
        has_content = has_words(delta)
        if index in self._finished_choices:
            choice["finish_reason"] = None
            return has_content
        if reason:
            self._finished_choices.add(index)
            if reason == "stop" and any(place == index for place, _ in self._calls):
                choice["finish_reason"] = "tool_calls"
            self.stop_reason = choice["finish_reason"]
        self.started = self.started or has_content or bool(reason) and reason != "stop"
        if index not in self._roles:
            self._roles.add(index)
            choice["delta"] = {"role": "assistant", "content": "", **present(**delta)}
        return True

    def _mend_delta(self, index: int, delta: Dict[str, Any]) -> None:
        delta.pop("role", None)
        self.issued.extend(seal for detail in delta.get("reasoning_details") or () for seal in detail_seals(detail))
        rename_reasoning(delta)
        if isinstance(delta.get("content"), list):
            delta["content"] = join_text_parts(delta["content"])
        for name in ("content", "reasoning_content", "refusal"):
            if isinstance(delta.get(name), str):
                delta[name] = self._mender.mend((index, name), delta[name])
        calls = [self._mend_call(index, call) for call in delta.pop("tool_calls", None) or ()]
        if any(calls):
            delta["tool_calls"] = [call for call in calls if call]

    def _mend_call(self, choice_index: int, call: Dict[str, Any]) -> Dict[str, Any]:
        """One tool-call fragment: id, type and name in the first only, and no first before the name is known."""
        function = as_dict(call.get("function"))
        place = self._call_place(choice_index, call, function)
        state = self._calls.setdefault((choice_index, place), {"sent": False, "held": "", "id": "", "name": ""})
        call = {**call, "index": place}
        if isinstance(function.get("arguments"), str):
            function["arguments"] = self._mender.mend((choice_index, place, "arguments"), function["arguments"])
        if state["sent"]:
            call = {name: value for name, value in call.items() if name not in ("id", "type")}
            if "function" in call:
                call["function"] = {name: value for name, value in function.items() if name != "name"}
            return call
        state.update(id=call.get("id") or state["id"], name=function.get("name") or state["name"])
        if (call.get("type") or "function") == "function" and not state["name"]:
            state["held"] += function.get("arguments") or ""
            return {}
        state["sent"] = True
        call = {"type": "function", **present(**call), "id": self._call_ids.fresh(state["id"])}
        if call["type"] == "function":
            arguments = state["held"] + (function.get("arguments") or "")
            call["function"] = {**function, "name": state["name"], "arguments": arguments}
        return call

    def _call_place(self, choice_index: int, call: Dict[str, Any], function: Dict[str, Any]) -> int:
        """The call's own index; the next free one for hosts that give none, or the same to every call (see
        `ChatReader`)."""
        given, call_id = call.get("index"), call.get("id")
        known = sum(choice == choice_index for choice, _ in self._calls)
        if given is None:
            return known if call_id or not known else known - 1
        place = self._newest.get((choice_index, given), given)
        state = self._calls.get((choice_index, place))
        if state and state["id"] and call_id and call_id != state["id"] and function.get("name"):
            place = self._newest[choice_index, given] = known
        return place

    def _ended(self) -> bytes:
        if self._finished_choices or (self.started and not self.model.flag("supportsFinishReason", True)):
            return self._finish()
        return super()._ended()

    def _finish(self) -> bytes:
        if not self._envelope:
            raise UpstreamProtocolError("the provider's answer is empty")
        if self._raw_usage is not None:
            self.usage = read_chat_usage(self._raw_usage)
        if is_empty(self.stop_reason, self.usage, self.started):
            raise EmptyAnswer("the provider's answer is empty")
        self.started = self.finished = True
        out = b""
        if not self._finished_choices:
            self.stop_reason = "tool_calls" if self._calls else "stop"
            out = self._event({**self._envelope, "choices": [self._last_choice()]}, None)
        if self._raw_usage is not None:
            if self.request.include_usage:
                out += self._event({**self._envelope, "choices": []}, self._raw_usage)
        return out + b"data: [DONE]\n\n"

    def _last_choice(self) -> Dict[str, Any]:
        return {"index": 0, "delta": {}, "logprobs": None, "finish_reason": self.stop_reason}

    def relay_whole(self, body: bytes, data: Dict[str, Any]) -> bytes:
        """See `NativeLane.relay_whole`."""
        choices = data.get("choices")
        if not isinstance(choices, list) or not choices:
            raise stream_error(data) if data.get("error") else UpstreamProtocolError(
                "the provider's answer has no choices")
        for place, choice in enumerate(choices):
            choice.setdefault("index", place)
            choice.setdefault("logprobs", None)
            self._mend_message(choice)
        usage = as_dict(data.get("usage"))
        data.update(id=self.make_id(data.get("id") or "", self.stamp), object=self.whole_type, model=self.request.model,
                    created=data.get("created") or self.stamp.created, usage=usage or chat_usage(Usage()),
                    system_fingerprint=data.get("system_fingerprint") or FINGERPRINT)
        self.usage, self.stop_reason = read_chat_usage(usage), choices[0]["finish_reason"]
        if is_empty(self.stop_reason, self.usage, any(self._has_words(choice) for choice in choices)):
            raise EmptyAnswer("the provider's answer is empty")
        self.started = self.finished = True
        return dumps(clean_strings(data)).encode("ascii")

    def _has_words(self, choice: Dict[str, Any]) -> bool:
        return has_words(choice["message"])

    def _mend_message(self, choice: Dict[str, Any]) -> None:
        message = choice["message"] = {"role": "assistant", "content": None, "refusal": None, **choice["message"]}
        reason = choice["finish_reason"] = choice.get("finish_reason") or "stop"
        if reason in CHAT_FAILURES:
            raise UpstreamError(f"the provider stopped: {reason}")
        rename_reasoning(message)
        self.issued.extend(seal for detail in message.get("reasoning_details") or () for seal in detail_seals(detail))
        if isinstance(message["content"], list):
            message["content"] = join_text_parts(message["content"])
        if not isinstance(message["content"], (str, type(None))):
            raise UpstreamProtocolError("the provider's answer has content that is no text")
        if not message.get("tool_calls"):
            message.pop("tool_calls", None)
            message["content"] = message["content"] or ""
            return
        if reason == "stop":
            choice["finish_reason"] = "tool_calls"
        for call in message["tool_calls"]:
            call.setdefault("type", "function")
            call["id"] = self._call_ids.fresh(call.get("id") or "")


def without_details(message: Dict[str, Any], foreign: FrozenSet[str]) -> Dict[str, Any]:
    """A message of a client without the reasoning that other models sealed."""
    details = message.get("reasoning_details")
    if not isinstance(details, list):
        return message
    kept = [detail for detail in details
            if not any(seal in foreign or seal.startswith(_SEAL) for seal in detail_seals(detail))]
    message = {name: value for name, value in message.items() if name != "reasoning_details"}
    return {**message, "reasoning_details": kept} if kept else message


def has_words(message: Mapping[str, Any]) -> bool:
    """Whether a chat message or delta says anything beside its role."""
    return any(value not in (None, "", []) for name, value in message.items() if name != "role")


def rename_reasoning(delta: Dict[str, Any]) -> None:
    """Hosts call the reasoning text by three names and some send it twice; clients look for `reasoning_content`."""
    texts = [delta.pop(name) for name in REASONING_FIELDS if isinstance(delta.get(name), str)]
    text = next((text for text in texts if text), None)
    if text is not None:
        delta["reasoning_content"] = text


def carried_headers(request: Request) -> Dict[str, str]:
    """The client's headers that OpenAI's API defines."""
    return {name: request.headers[name] for name in CARRIED_TO_OPENAI if name in request.headers}


class TextLane(ChatLane):
    """Legacy Completions to OpenAI-compatible: field-exact likewise. Not all of these hosts have the path, nor all of
    their models: `Gateway` takes the translated lane when they say so."""

    chunk_type = whole_type = "text_completion"
    make_id = staticmethod(text_id)

    def call(self, credential: Credential) -> Tuple[Call, List[str]]:
        """See `Lane.call`."""
        body = {**self.request.data, "model": self.model.id}
        adapt_stream(body, self.model)
        body.update(self.model.sampling)
        call = self.upstream.relay("/completions", body, self.request, self.model, credential)
        return call._replace(headers={**carried_headers(self.request), **call.headers}), []

    def _mend_choice(self, choice: Dict[str, Any]) -> bool:
        index, reason = choice.setdefault("index", 0), choice.setdefault("finish_reason", None)
        choice.setdefault("logprobs", None)
        choice["text"] = self._mender.mend(index, choice.get("text") or "")
        if reason in CHAT_FAILURES:
            raise UpstreamError(f"the provider stopped: {reason}")
        if reason:
            self._finished_choices.add(index)
            self.stop_reason = reason
        # nothing to add to a prompt is an answer, too
        self.started = self.started or bool(choice["text"] or reason)
        return True

    def _last_choice(self) -> Dict[str, Any]:
        return text_choice("", self.stop_reason)

    def _has_words(self, choice: Dict[str, Any]) -> bool:
        return True

    def _mend_message(self, choice: Dict[str, Any]) -> None:
        if not isinstance(choice["text"], str):
            raise UpstreamProtocolError("the provider's answer has text that is no text")
        choice["finish_reason"] = choice.get("finish_reason") or "stop"
        if choice["finish_reason"] in CHAT_FAILURES:
            raise UpstreamError(f"the provider stopped: {choice['finish_reason']}")


class EmbeddingLane(Lane):
    """Embeddings to any host that has them. What comes back is put right: the model's name, the form of the numbers
    that the client asked for, one embedding for each text, usage."""

    limit_bytes = MAX_VECTORS_BYTES
    forms: Mapping[Optional[str], Callable[[Any], Any]] = {None: as_floats, "float": as_floats, "base64": as_base64}

    def call(self, credential: Credential) -> Tuple[Call, List[str]]:
        """See `Lane.call`. Raises `NotSupported` when the host's protocol has no embeddings."""
        request, model = self.request, self.model
        embedder = EMBEDDERS.get(self.upstream.name)
        if embedder is None:
            raise NotSupported(f'"{model.full_id}" cannot make embeddings: {self.upstream.name} has none',
                               param="model")
        if not embedder.takes_tokens and not all(isinstance(text, str) for text in self._inputs()):
            refuse([("input", f"{model.full_id} takes text, not tokens")])
        self.name, self._embedder = embedder.lane, embedder
        fields, dropped = embedder.fields(request.data)
        return embedder.build(self.upstream, fields, request, model, credential), dropped

    def _inputs(self) -> List[Any]:
        return texts_or_tokens(self.request.data, "input")

    def feed(self, data: bytes) -> bytes:
        """See `Lane.feed`: nobody streams embeddings."""
        raise UpstreamProtocolError("the provider streams where embeddings were asked for")

    def end(self) -> bytes:
        """See `Lane.end`."""
        return self.feed(b"")

    def whole(self, body: bytes) -> bytes:
        """See `Lane.whole`."""
        data = parse_answer(body)
        try:
            answer = self._answer(self._embedder.read(data))
            out = self._same_but_model(body, data, answer) or dumps(answer).encode("ascii")
            self.started = self.finished = True
            return out
        except (*MALFORMED, struct.error) as error:
            log.debug("malformed provider answer", exc_info=True)
            raise UpstreamProtocolError(f"the provider's answer is malformed ({type(error).__name__})") from None

    def _same_but_model(self, body: bytes, data: Dict[str, Any], answer: Dict[str, Any]) -> bytes:
        """The provider's bytes with the one model name in them replaced, b"" when more has to change: writing millions
        of numbers takes seconds, in which no other thread runs."""
        found = _MODEL_VALUE.search(body)
        is_plain = body.startswith(b"{") and b"\\" not in body and body.count(b'"model"') == 1
        if not found or not is_plain or answer != {**data, "model": self.request.model} or (
                json.loads(found.group(1)) != data.get("model")):
            return b""
        return body[:found.start(1)] + dumps(self.request.model).encode("ascii") + body[found.end(1):]

    def _answer(self, data: Dict[str, Any]) -> Dict[str, Any]:
        """The host's answer, in OpenAI's shape, put right."""
        items, asked = data.get("data"), len(self._inputs())
        if not isinstance(items, list):
            raise stream_error(data) if data.get("error") else UpstreamProtocolError(
                "the provider's answer has no data")
        if len(items) != asked:
            raise UpstreamProtocolError(f"the provider made {len(items)} embeddings of {asked} texts")
        form = self.forms[self.request.data.get("encoding_format")]
        usage = {"prompt_tokens": 0, "total_tokens": 0, **as_dict(data.get("usage"))}
        rest = clean_strings({name: value for name, value in data.items() if name != "data"})
        self.usage = read_chat_usage(usage)
        return {**rest, "object": "list", "model": self.request.model, "usage": usage, "data": [
            {"index": place, **item, "object": "embedding", "embedding": form(item["embedding"])}
            for place, item in enumerate(items)]}


class ResponsesLane(NativeLane):
    """Responses to Responses: events as they come, with the model's name put back. What OpenAI's SDKs and Codex rely on
    and some hosts leave out is put in: the first event, event names, numbers, the place and id of the item that is
    meant, the name and the contents of the last event."""

    _BEGINNINGS = ("response.created", "response.in_progress", "response.queued")
    _ENDS = ("completed", "incomplete", "failed", "cancelled")
    # what events inside an item are about → the index that says where in the item
    _INSIDE = {**dict.fromkeys(("content_part", "output_text", "refusal", "reasoning_text"), "content_index"),
               **dict.fromkeys(("reasoning_summary_part", "reasoning_summary_text"), "summary_index"),
               **dict.fromkeys(("function_call_arguments", "custom_tool_call_input"), "output_index")}

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self._shape = ResponseShape(self.request, self.stamp)
        self._response: Dict[str, Any] = {}     # as the first event tells it
        self._number = 0                        # of the next event
        self._newest: Dict[str, Any] = {"output_index": -1, "item_id": ""}
        self._items: Dict[Any, Any] = {}        # complete ones by place: some hosts leave them out of the last event

    def call(self, credential: Credential) -> Tuple[Call, List[str]]:
        """The client's own bytes with the model's name put in, unless the host demands more."""
        request, model = self.request, self.model
        body, dropped = self.upstream.adapt(request, model, credential)
        if body == {**request.data, "model": body["model"]} and not has_repeated_keys(request.body):
            data = splice_model(request.body, request.data, body["model"])
        else:
            data = dumps(body).encode("ascii")
        carried = {name: request.headers[name] for name in CARRIED_TO_OPENAI if name in request.headers}
        headers = {**carried, **self.upstream.headers(request, model, credential)}
        return Call("POST", self.upstream.url(model, credential), headers, data), dropped

    def relay_event(self, name: str, text: str) -> bytes:
        """See `NativeLane.relay_event`."""
        if text.strip() == "[DONE]":
            return b""
        data = loads(text)
        kind = data.get("type") or name
        if not isinstance(kind, str) or "\n" in kind:
            raise UpstreamProtocolError("the provider sent an event whose type is no text")
        if kind == "error" or data.get("error") and not kind:
            raise responses_error(data.get("error") or data, self.stamp.created)
        if not kind:
            return b""
        as_it_was = dict(data)
        opening = b"" if self._opened or kind in self._BEGINNINGS else self._begin()
        if kind.rpartition(".")[2] in ("done", *self._ENDS) and "response" in data:
            kind = self._end(kind, data)
        elif kind in self._BEGINNINGS:
            kind = self._note_beginning(kind, data)
        else:
            self.started = True
            self._note_item(kind, data)
        data["type"] = kind
        self._put_in_place(kind, data)
        text = text if data == as_it_was else dumps(data)
        lines = "".join(f"data: {line}\n" for line in text.split("\n"))
        return opening + f"event: {kind}\n{lines}\n".encode("utf-8")

    def _begin(self) -> bytes:
        """The first event, where the host has left it out."""
        self._opened = True
        self._response = self._shape.response("in_progress")
        return self._own_event("response.created", self._response)

    def _own_event(self, kind: str, response: Dict[str, Any]) -> bytes:
        self._number += 1
        return sse({"type": kind, "response": response, "sequence_number": self._number - 1}, kind)

    def _note_beginning(self, kind: str, data: Dict[str, Any]) -> str:
        """Takes an event that tells of the response itself; its type, since the first has to be response.created."""
        kind = kind if self._opened else self._BEGINNINGS[0]
        self._opened = True
        self._response = data["response"] = {**data["response"], "model": self.request.model}
        return kind

    def _note_item(self, kind: str, data: Dict[str, Any]) -> None:
        """Remembers the item that an event begins or ends."""
        if kind not in ("response.output_item.added", "response.output_item.done"):
            return
        item, is_new = data["item"], kind.endswith("added")
        if data.get("output_index") is None:
            data["output_index"] = max(0, self._newest["output_index"] + is_new)
        if is_new:
            self._newest = {"output_index": data["output_index"], "item_id": item.get("id") or ""}
        else:
            self._items[data["output_index"]] = item
            self._note_seal(item)

    def _note_seal(self, item: Any) -> None:
        sealed = as_dict(item).get("encrypted_content")
        if isinstance(sealed, str):
            self.issued.append(sealed)

    def _put_in_place(self, kind: str, data: Dict[str, Any]) -> None:
        """Adds the indices, the item's id and the number that an event lacks."""
        index = self._INSIDE.get(kind[len("response."):].rpartition(".")[0])
        if index:
            for name, value in {index: 0, **self._newest}.items():
                if data.get(name) is None:
                    data[name] = value
        number = data.get("sequence_number")
        if not isinstance(number, int) or number < self._number:
            number = data["sequence_number"] = self._number
        self._number = number + 1

    def _end(self, kind: str, data: Dict[str, Any]) -> str:
        """Takes the last event and completes it; its type."""
        response = dict(data["response"])
        status = response.get("status")
        if status not in self._ENDS:
            status = kind.rpartition(".")[2].replace("done", "completed")
        if status in ("failed", "cancelled"):
            status, response = "failed", self._failed(response, status)
        output = response.get("output") or [self._items[place] for place in sorted(self._items)]
        for item in output:
            self._note_seal(item)
        response = {**self._response, **response, "status": status, "model": self.request.model, "output": output}
        if self._response.get("id") == self._shape.id:
            response["id"] = self._shape.id     # ours from the first event on
        if status != "failed":
            self._read_end(response)
        self.finished = self.started = True
        data["response"] = response
        return f"response.{status}"

    def _failed(self, response: Dict[str, Any], status: str) -> Dict[str, Any]:
        """Notes the provider's own failure, which before anything was shown is raised, to become an HTTP status; the
        response as it may be shown."""
        error = responses_error(response.get("error") or {"message": f"the provider's answer ended as {status}"},
                                self.stamp.created)
        if not self.started:
            raise error
        error.hide(self.secrets)
        self.error = error
        return {**redact_strings(response, self.secrets), "error": response_failure(error)}

    def _read_end(self, response: Dict[str, Any]) -> None:
        self.usage = read_responses_usage(as_dict(response.get("usage")))
        self.stop_reason = as_dict(response.get("incomplete_details")).get("reason") or response["status"]
        if is_empty("stop" if self.stop_reason == "completed" else "length", self.usage, bool(response["output"])):
            raise EmptyAnswer("the provider's answer is empty")

    def fail(self, error: GatewayError) -> bytes:
        """See `Lane.fail`: a response.failed event, with what is known of the response."""
        if self.finished:
            return b""
        opening = b"" if self._opened else self._begin()
        self.finished, self.error = True, error
        error.hide(self.secrets)
        failed = self._shape.failed([self._items[place] for place in sorted(self._items)], error)
        known = {name: value for name, value in self._response.items() if name not in ("status", "error", "output")}
        return opening + self._own_event("response.failed", {**failed, **known})

    def relay_whole(self, body: bytes, data: Dict[str, Any]) -> bytes:
        """See `NativeLane.relay_whole`."""
        status, output = data.get("status") or "completed", data.get("output")
        if status in ("failed", "cancelled") or not isinstance(output, list) and data.get("error"):
            raise responses_error(data.get("error") or {"message": f"the provider's answer ended as {status}"},
                                  self.stamp.created)
        if not isinstance(output, list) or not all(isinstance(as_dict(item).get("type"), str) for item in output):
            raise UpstreamProtocolError("the provider's answer has no output")
        self._read_end({**data, "status": status})
        for item in output:
            self._note_seal(item)
        self.started = self.finished = True
        return splice_model(body, data, self.request.model)


NATIVE_LANES: Dict[Tuple[str, str], Type[NativeLane]] = {
    (OpenAIChat.name, OpenAICompletions.name): ChatLane,
    (OpenAITexts.name, OpenAICompletions.name): TextLane, (OpenAITexts.name, OpenAIResponses.name): TextLane,
    (OpenAITexts.name, AzureResponses.name): TextLane,
    (AnthropicClient.name, AnthropicMessages.name): AnthropicLane,
    **{(ResponsesClient.name, kind.name): ResponsesLane for kind in (OpenAIResponses, AzureResponses, CodexResponses)}}
# Client protocols whose requests are no conversation, so that there is nothing to translate.
OWN_LANES: Dict[str, Type[Lane]] = {OpenAIEmbeddings.name: EmbeddingLane}


def choose_lane(client: ClientProtocol, upstream: UpstreamProtocol, request: Request) -> Type[Lane]:
    """Native when both sides speak the same protocol. A chat conversation that every provider would refuse as it is
    (calls and results that do not pair up, images in tool messages) is translated all the same."""
    lane = NATIVE_LANES.get((client.name, upstream.name), OWN_LANES.get(client.name, TranslatedLane))
    if lane is not ChatLane:
        return lane
    has_tool_image = any(isinstance(part, (Image, Document)) for message in request.messages if message.role == "tool"
                         for part in _flat_parts(message.parts))
    return TranslatedLane if has_tool_image or not is_paired(request.messages) else lane


# --- The built-in model -----------------------------------------------------------------------------------------------


def demo_reply(request: Request) -> Reply:
    """What the built-in model answers: it repeats the last thing said. It thinks when told to, calls a tool when it must
    or when the user's words name one, and fills in a JSON schema when one is given. The same request always gives the
    same reply."""
    parts: List[Part] = []
    last = request.messages[-1] if request.messages else Message("user", request.system)
    said = " ".join(part.text for part in _flat_parts(last.parts) if isinstance(part, Text)).strip()
    pictures = sum(isinstance(part, Image) for part in _flat_parts(last.parts))
    if request.reasoning and request.reasoning.level != "off":
        parts.append(Thinking(f"I am to repeat what was said last. Words: {len(said.split())}."))
    tool = None if last.role == "tool" else _demo_tool(request, said)
    if tool is not None:
        arguments = json_text(example_value(tool.schema, tool.schema))
        parts.append(ToolCall(f"call_demo_{len(request.messages)}", tool.name, arguments))
        stop_reason = "tool_use"
    else:
        text = said or "Hello! I am the built-in demo model."
        if request.output:
            schema = request.output.schema or {"type": "object", "properties": {"echo": {"const": said}}}
            text = json_text(example_value(schema, schema))
        elif pictures:
            text += f" [{pictures} image{'s' if pictures > 1 else ''}]"
        text, stop_reason, detail = _demo_cut(text, request)
        parts.append(Text(text))
        return Reply("", tuple(parts), stop_reason, _demo_usage(request, parts), detail)
    return Reply("", tuple(parts), stop_reason, _demo_usage(request, parts))


def _demo_tool(request: Request, said: str) -> Optional[Tool]:
    choice = request.tool_choice or ToolChoice("auto")
    if choice.kind == "none":
        return None
    if choice.kind == "tool":
        return next((tool for tool in request.tools if tool.name == choice.name), None)
    words = re.findall(r"\w+", said.lower())
    named = [tool for tool in request.tools if tool.name.lower() in said.lower()
             or (set(re.findall(r"[a-z]{4,}", tool.name.lower())) & set(words))]
    return next(iter(named or (request.tools if choice.kind == "required" else ())), None)


def _demo_cut(text: str, request: Request) -> Tuple[str, str, Optional[str]]:
    """The text up to the first stop sequence or the output limit, the stop reason, the stop sequence."""
    found = [(text.find(stop), stop) for stop in request.stop if stop in text]
    if found:
        place, stop = min(found)
        return text[:place], "stop_sequence", stop
    words = re.findall(r"\s*\S+", text)
    if request.max_tokens and len(words) > request.max_tokens:
        return "".join(words[:request.max_tokens]), "length", None
    return text, "stop", None


def _demo_usage(request: Request, parts: Sequence[Part]) -> Usage:
    spoken = [len((getattr(part, "text", "") + getattr(part, "arguments", "")).split()) for part in parts]
    thought = sum(count for count, part in zip(spoken, parts) if isinstance(part, Thinking))
    return Usage(input=estimate_tokens(request), output=max(1, sum(spoken)), reasoning=thought)


def example_value(schema: Any, root: Mapping[str, Any], depth: int = 0) -> Any:
    """A small value that fits a JSON Schema, always the same one; `root` holds what `$ref` may point to."""
    if not isinstance(schema, Mapping) or depth > 12:
        return None
    for name in ("const", "default"):
        if name in schema:
            return schema[name]
    if schema.get("enum"):
        return schema["enum"][0]
    if isinstance(schema.get("$ref"), str):
        target: Any = root
        for step in schema["$ref"].lstrip("#/").split("/"):
            target = target.get(step, {}) if isinstance(target, Mapping) else {}
        return example_value(target, root, depth + 1)
    for name in ("anyOf", "oneOf", "allOf"):
        if schema.get(name):
            return example_value(schema[name][0], root, depth + 1)
    kind = schema.get("type") or ("object" if "properties" in schema else "string")
    kind = kind[0] if isinstance(kind, list) else kind
    if not isinstance(kind, str):
        return "demo"
    if kind == "object":
        properties = as_dict(schema.get("properties"))
        required = schema.get("required")
        names = [name for name in required if isinstance(name, str)] if isinstance(required, list) and required else properties
        return {name: example_value(properties.get(name, {}), root, depth + 1) for name in names}
    if kind == "array":
        items = schema.get("items", {})
        return [example_value(items, root, depth + 1) for _ in range(max(1, schema.get("minItems", 1)))]
    return {"integer": schema.get("minimum", 1), "number": schema.get("minimum", 1.5), "boolean": True,
            "null": None}.get(kind, "demo")


def demo_stream(body: bytes, stamp: Stamp, client: ClientProtocol = CHAT) -> Tuple[str, List[bytes]]:
    """The built-in model as an OpenAI-compatible server: (content type, the pieces of the answer)."""
    request = client.parse(parse_json_object(body))
    refuse(request.refused)
    reply = demo_reply(request)
    if not request.stream:
        return "application/json", [dumps(client.render(request, reply, stamp)).encode("ascii")]
    writer = client.writer(request, stamp)
    pieces = [writer.write([Start()])]
    for index, part in enumerate(reply.parts):
        text = part.arguments if isinstance(part, ToolCall) else part.text
        blank = replace(part, arguments="") if isinstance(part, ToolCall) else type(part)()
        pieces.append(writer.write([PartStart(index, blank)]))
        pieces.extend(writer.write([PartDelta(index, word)]) for word in re.findall(r"\s*\S+\s*$|\s*\S+", text))
        pieces.append(writer.write([PartEnd(index, part)]))
    pieces.append(writer.write([Done(reply.stop_reason, reply.usage, reply.detail)]))
    return "text/event-stream", [piece for piece in pieces if piece]


DEMO_DIMENSIONS, MAX_DEMO_DIMENSIONS = 64, 4096


def demo_embeddings(body: bytes, stamp: Stamp) -> Tuple[str, List[bytes]]:
    """The built-in model's embeddings: texts that share words are near each other, and the same text is the same."""
    data = parse_json_object(body)
    texts, size = texts_or_tokens(data, "input"), data.get("dimensions") or DEMO_DIMENSIONS
    items = [{"object": "embedding", "index": place, "embedding": _demo_vector(text, size)}
             for place, text in enumerate(texts)]
    read = sum(len(_demo_words(text)) for text in texts)
    answer = {"object": "list", "data": items, "model": data.get("model"),
              "usage": {"prompt_tokens": read, "total_tokens": read}}
    return "application/json", [dumps(answer).encode("ascii")]


def _demo_words(text: Any) -> List[str]:
    return text.lower().split() if isinstance(text, str) else list(map(str, text))


def _demo_vector(text: Any, size: int) -> List[float]:
    """Each word counts at a place of its own; of length 1."""
    if size > MAX_DEMO_DIMENSIONS:
        raise BadRequest(f"dimensions: must be at most {MAX_DEMO_DIMENSIONS}", param="dimensions")
    vector = [0.0] * size
    for word in _demo_words(text) or [""]:
        vector[zlib.crc32(word.encode("utf-8", "replace")) % size] += 1.0
    length = math.sqrt(sum(value * value for value in vector))
    return [value / length for value in vector]


# What the built-in model answers at which path.
DEMO_PATHS: Dict[str, Callable[[bytes, Stamp], Tuple[str, List[bytes]]]] = {
    "/chat/completions": demo_stream, "/completions": functools.partial(demo_stream, client=TEXTS),
    "/embeddings": demo_embeddings}


# ======================================================================================================================
# §9 Catalogue
# ======================================================================================================================

DEMO = "demo"
DEMO_PROVIDER = Provider(DEMO, {OpenAICompletions.name: "demo://built-in"}, keyless=True)
DEMO_MODEL = Model("echo", DEMO, OpenAICompletions.name, "demo://built-in", "Built-in demo model", 100_000, 8192,
                   ("text", "image"), True)

_STRICT = {"supportsStrictMode": True}
_BASIC = {"supportsStore": False, "supportsDeveloperRole": False}
_LIMITED = {**_BASIC, "maxTokensField": "max_tokens"}
_KIMI = {**_LIMITED, "supportsReasoningEffort": True, "supportsStrictMode": False,
         "supportsMidConvoSystemMessages": True}
_ZAI = {**_LIMITED, **_STRICT, "supportsReasoningEffort": True, "thinkingFormat": "zai", "zaiToolStream": True}
_QWEN = {**_BASIC, **_STRICT, "supportsReasoningEffort": True, "thinkingFormat": "qwen"}
_XIAOMI = {**_STRICT, "supportsReasoningEffort": False, "requiresReasoningContentOnAssistantMessages": True,
           "thinkingFormat": "deepseek"}
_NO_SCHEMA = {"supportsOutputFormat": False}

# The order decides which provider a bare model id goes to: makers first, then hosts, then aggregators.
PROVIDERS: Dict[str, Provider] = {provider.name: provider for provider in (
    Provider("anthropic", {"anthropic-messages": "https://api.anthropic.com"},
             env=("ANTHROPIC_OAUTH_TOKEN", "ANTHROPIC_API_KEY"), compat={"supportsStrictTools": True}),
    Provider("openai", {"openai-responses": "https://api.openai.com/v1"}, env=("OPENAI_API_KEY",), compat=_STRICT),
    Provider("openai-codex", {"openai-codex-responses": "https://chatgpt.com/backend-api"},
             compat={"supportsOpenAIGrammarTools": True, "supportsMidConvoSystemMessages": True}),
    Provider("google", {"google-generative-ai": "https://generativelanguage.googleapis.com/v1beta"},
             env=("GEMINI_API_KEY",)),
    Provider("google-gemini-cli", {"google-gemini-cli": "https://cloudcode-pa.googleapis.com"},
             compat={"codeAssistAgent": "gemini-cli"}, source="code-assist"),
    Provider("google-antigravity", {"google-gemini-cli": "https://daily-cloudcode-pa.googleapis.com"},
             compat={"codeAssistAgent": "antigravity"}, source="code-assist"),
    Provider("xai", {"openai-responses": "https://api.x.ai/v1"}, env=("XAI_API_KEY",)),
    Provider("meta", {"openai-responses": "https://api.meta.ai/v1"}, env=("META_API_KEY",)),
    Provider("mistral", {"mistral-conversations": "https://api.mistral.ai"}, env=("MISTRAL_API_KEY",)),
    Provider("deepseek", {"openai-completions": "https://api.deepseek.com"}, env=("DEEPSEEK_API_KEY",),
             compat={**_LIMITED, **_STRICT, "requiresReasoningContentOnAssistantMessages": True,
             "thinkingFormat": "deepseek"}),
    Provider("moonshotai", {"openai-completions": "https://api.moonshot.ai/v1"}, env=("MOONSHOT_API_KEY",),
             compat={**_KIMI, "thinkingFormat": "openai"}),
    Provider("moonshotai-cn", {"openai-completions": "https://api.moonshot.cn/v1"}, env=("MOONSHOT_API_KEY",),
             compat={**_KIMI, "thinkingFormat": "openai"}),
    Provider("kimi-coding", {"openai-completions": "https://api.kimi.com/coding/v1"}, env=("KIMI_API_KEY",),
             compat={**_KIMI, "thinkingFormat": "openai"}),
    Provider("zai", {"openai-completions": "https://api.z.ai/api/coding/paas/v4"}, env=("ZAI_API_KEY",), compat=_ZAI),
    Provider("zai-coding-cn", {"openai-completions": "https://open.bigmodel.cn/api/coding/paas/v4"},
             env=("ZAI_CODING_CN_API_KEY",), compat=_ZAI),
    Provider("minimax", {"anthropic-messages": "https://api.minimax.io/anthropic"}, env=("MINIMAX_API_KEY",),
             compat=_NO_SCHEMA),
    Provider("minimax-cn", {"anthropic-messages": "https://api.minimaxi.com/anthropic"}, env=("MINIMAX_CN_API_KEY",),
             compat=_NO_SCHEMA),
    Provider("qwen-token-plan",
             {"openai-completions": "https://token-plan.ap-southeast-1.maas.aliyuncs.com/compatible-mode/v1"},
             env=("QWEN_TOKEN_PLAN_API_KEY",), compat=_QWEN),
    Provider("qwen-token-plan-cn",
             {"openai-completions": "https://token-plan.cn-beijing.maas.aliyuncs.com/compatible-mode/v1"},
             env=("QWEN_TOKEN_PLAN_CN_API_KEY",), compat=_QWEN, models="qwen-token-plan"),
    Provider("qwen-token-plan-individual",
             {"openai-completions": "https://token-plan.ap-southeast-1.maas.aliyuncs.com/compatible-mode/v1"},
             env=("QWEN_TOKEN_PLAN_API_KEY",), compat=_QWEN),
    Provider("qwen-token-plan-individual-cn",
             {"openai-completions": "https://token-plan.cn-beijing.maas.aliyuncs.com/compatible-mode/v1"},
             env=("QWEN_TOKEN_PLAN_CN_API_KEY",), compat=_QWEN, models="qwen-token-plan-individual"),
    Provider("xiaomi", {"openai-completions": "https://api.xiaomimimo.com/v1"}, env=("XIAOMI_API_KEY",),
             compat=_XIAOMI),
    Provider("xiaomi-token-plan-ams", {"openai-completions": "https://token-plan-ams.xiaomimimo.com/v1"},
             env=("XIAOMI_TOKEN_PLAN_AMS_API_KEY",), compat=_XIAOMI),
    Provider("xiaomi-token-plan-cn", {"openai-completions": "https://token-plan-cn.xiaomimimo.com/v1"},
             env=("XIAOMI_TOKEN_PLAN_CN_API_KEY",), compat=_XIAOMI, models="xiaomi-token-plan-ams"),
    Provider("xiaomi-token-plan-sgp", {"openai-completions": "https://token-plan-sgp.xiaomimimo.com/v1"},
             env=("XIAOMI_TOKEN_PLAN_SGP_API_KEY",), compat=_XIAOMI, models="xiaomi-token-plan-ams"),
    Provider("ant-ling", {"openai-completions": "https://api.ant-ling.com/v1"}, env=("ANT_LING_API_KEY",),
             compat={**_LIMITED, **_STRICT, "supportsReasoningEffort": False, "thinkingFormat": "ant-ling"}),
    Provider("groq", {"openai-completions": "https://api.groq.com/openai/v1"}, env=("GROQ_API_KEY",), compat=_STRICT),
    Provider("cerebras", {"openai-completions": "https://api.cerebras.ai/v1"}, env=("CEREBRAS_API_KEY",),
             compat=_BASIC),
    Provider("together", {"openai-completions": "https://api.together.ai/v1"}, env=("TOGETHER_API_KEY",),
             compat={**_LIMITED, "supportsReasoningEffort": False, "thinkingFormat": "together",
             "supportsStrictMode": False}),
    Provider("fireworks", {"openai-completions": "https://api.fireworks.ai/inference/v1",
             "anthropic-messages": "https://api.fireworks.ai/inference"}, env=("FIREWORKS_API_KEY",),
             compat={**_BASIC, **_NO_SCHEMA, **_STRICT, "sendSessionAffinityHeaders": True,
             "supportsCacheControlOnTools": False, "forceAdaptiveThinking": True, "allowEmptySignature": True}),
    Provider("baseten", {"openai-completions": "https://inference.baseten.co/v1"}, env=("BASETEN_API_KEY",),
             compat={**_LIMITED, **_STRICT, "supportsReasoningEffort": True, "supportsUsageInStreaming": True,
             "sendSessionAffinityHeaders": True}),
    Provider("nvidia", {"openai-completions": "https://integrate.api.nvidia.com/v1"}, env=("NVIDIA_API_KEY",),
             headers={"NVCF-POLL-SECONDS": "3600"}, compat={**_LIMITED, "supportsReasoningEffort": False,
             "supportsStrictMode": False}),
    Provider("cloudflare-workers-ai",
             {"openai-completions": "https://api.cloudflare.com/client/v4/accounts/{CLOUDFLARE_ACCOUNT_ID}/ai/v1"},
             env=("CLOUDFLARE_API_KEY",), compat={**_BASIC, **_STRICT, "sendSessionAffinityHeaders": True}),
    Provider("cloudflare-ai-gateway",
             {"openai-responses": "https://gateway.ai.cloudflare.com/v1/{CLOUDFLARE_ACCOUNT_ID}/{CLOUDFLARE_GATEWAY_ID}/openai",
             "openai-completions": "https://gateway.ai.cloudflare.com/v1/{CLOUDFLARE_ACCOUNT_ID}/{CLOUDFLARE_GATEWAY_ID}/compat",
             "anthropic-messages": "https://gateway.ai.cloudflare.com/v1/{CLOUDFLARE_ACCOUNT_ID}/{CLOUDFLARE_GATEWAY_ID}/anthropic"},
             env=("CLOUDFLARE_API_KEY",), compat={"supportsStore": False, "maxTokensField": "max_tokens",
             "sendSessionAffinityHeaders": True}, auth="cf-aig-authorization"),
    Provider("azure", {"azure-openai-responses": "", "openai-completions": ""}, env=("AZURE_OPENAI_API_KEY",),
             compat={"requiresReasoningContentOnAssistantMessages": True, "thinkingFormat": "openai"}, source="azure"),
    Provider("azure-openai-responses", {"azure-openai-responses": "", "openai-completions": ""},
             env=("AZURE_OPENAI_API_KEY",), compat={"requiresReasoningContentOnAssistantMessages": True,
             "thinkingFormat": "openai"}, models="azure", source="azure"),
    Provider("google-vertex", {"google-vertex": "https://{location}-aiplatform.googleapis.com"},
             env=("GOOGLE_CLOUD_API_KEY",), source="google"),
    Provider("amazon-bedrock", {"bedrock-converse-stream": "https://bedrock-runtime.us-east-1.amazonaws.com"},
             env=("AWS_BEARER_TOKEN_BEDROCK",), discover=True, source="aws"),
    Provider("github-copilot", {"openai-responses": "https://api.individual.githubcopilot.com",
             "anthropic-messages": "https://api.individual.githubcopilot.com",
             "openai-completions": "https://api.individual.githubcopilot.com"}, env=("COPILOT_GITHUB_TOKEN",),
             headers={"Copilot-Integration-Id": "vscode-chat", "Editor-Plugin-Version": "copilot-chat/0.35.0",
             "Editor-Version": "vscode/1.107.0", "User-Agent": "GitHubCopilotChat/0.35.0"},
             compat={"supportsStore": False, "supportsReasoningOff": False, "requestHeaders": "copilot"},
             auth="bearer", source="copilot", discover=True),
    Provider("opencode", {"openai-responses": "https://opencode.ai/inference/openai/v1",
             "openai-completions": "https://opencode.ai/inference/openai/v1",
             "anthropic-messages": "https://opencode.ai/inference/anthropic",
             "google-generative-ai": "https://opencode.ai/inference/google/v1beta"}, env=("OPENCODE_API_KEY",),
             compat={**_LIMITED, **_STRICT, "sessionAffinityFormat": "openai-nosession"}),
    Provider("opencode-go", {"openai-completions": "https://opencode.ai/inference/go/openai/v1",
             "anthropic-messages": "https://opencode.ai/inference/go/anthropic",
             "openai-responses": "https://opencode.ai/inference/go/openai/v1",
             "google-generative-ai": "https://opencode.ai/inference/go/google/v1beta"}, env=("OPENCODE_API_KEY",),
             compat={**_LIMITED, **_STRICT, "sessionAffinityFormat": "openai-nosession"}),
    Provider("huggingface", {"openai-completions": "https://router.huggingface.co/v1"}, env=("HF_TOKEN",),
             compat={**_STRICT, "supportsDeveloperRole": False}, discover=True),
    Provider("vercel-ai-gateway", {"anthropic-messages": "https://ai-gateway.vercel.sh"}, env=("AI_GATEWAY_API_KEY",),
             compat={"allowEmptySignature": True}, discover=True),
    Provider("openrouter", {"openai-completions": "https://openrouter.ai/api/v1",
             "anthropic-messages": "https://openrouter.ai/api"}, env=("OPENROUTER_API_KEY",), compat={**_STRICT,
             "supportsDeveloperRole": False, "thinkingFormat": "openrouter", "sendSessionAffinityHeaders": True,
             "sessionAffinityFormat": "openrouter"}, discover=True),
    DEMO_PROVIDER,
)}

# Servers on this machine know max_tokens, and not all of them its newer name.
LOCAL_COMPAT = {"maxTokensField": "max_tokens"}
LEVEL_SUFFIXES = {**LEVEL_ALIASES, "thinking": "medium"}


def parse_model_line(line: str, provider: Provider) -> Model:
    """A line of `MODELS`: id|context|output|flags|cost|levels|compat|protocol, trailing fields may be missing."""
    fields = line.split("|") + [""] * 8
    compat = dict(provider.compat)
    for word in fields[6].split():
        name, equals, value = word.partition("=")
        compat[name.lstrip("!")] = (json.loads(value) if value[:1] in "{[" else value) if equals else word[0] != "!"
    levels = {}
    for word in fields[5].split():
        level, _, value = word.partition("=")
        levels[level] = None if value == "-" else value
    if provider.auth:
        compat["auth"] = provider.auth
    protocol = fields[7] or provider.protocol
    return Model(
        id=fields[0], provider=provider.name, protocol=protocol, base_url=provider.endpoints[protocol],
        context_window=int(fields[1]), max_tokens=min(int(fields[2]), int(fields[1])), reasoning="r" in fields[3],
        input=("text", "image") if "i" in fields[3] else ("text",),
        cost=tuple(float(price) for price in fields[4].split(",") if price), thinking_levels=levels, compat=compat,
        headers=provider.headers)


def unlisted_model(provider: Provider, model_id: str, **facts: Any) -> Model:
    """A model of which only the provider is known, and what `facts` say."""
    compat = {**provider.compat, **({"auth": provider.auth} if provider.auth else {})}
    return Model(id=model_id, provider=provider.name, protocol=provider.protocol,
                 base_url=provider.endpoints[provider.protocol], compat=compat, headers=provider.headers, **facts)


# Models that are no chat models and so are not listed, by the bare name that clients have for them.
UNLISTED = {name: f"{maker}/{name}" for maker, names in {
    "openai": ("text-embedding-3-small", "text-embedding-3-large", "text-embedding-ada-002", "gpt-3.5-turbo-instruct",
               "davinci-002", "babbage-002"),
    "google": ("gemini-embedding-001",), "mistral": ("mistral-embed", "codestral-embed"),
}.items() for name in names}


class Catalogue:
    """The known models by provider, and the way from a name to one of them. What it holds is made when first
    asked for and replaced whole, so that threads share it without a lock."""

    def __init__(self, providers: Mapping[str, Provider], custom: Mapping[str, Mapping[str, Model]] = MappingProxyType({}),
                 allow: Optional[Sequence[str]] = None, deny: Sequence[str] = (), show_demo: bool = False) -> None:
        self.providers = providers
        self._custom = custom
        self._allow = allow
        self._deny = deny
        self._show_demo = show_demo
        self._models: Dict[str, Dict[str, Model]] = {}
        self._discovered: Dict[str, Dict[str, Model]] = {}
        self._found: Dict[str, Tuple[Mapping[str, Model], bool]] = {}

    def models_of(self, provider: Provider) -> Dict[str, Model]:
        """Its models by id: built in, then the user's, then what the server itself lists."""
        if provider.name in self._discovered:
            return self._discovered[provider.name]
        models = self._models.get(provider.name)
        if models is None:
            lines = MODELS.get(provider.models or provider.name, "").split("\n")
            models = {model.id: model for model in (parse_model_line(line, provider) for line in lines if line)}
            if provider.name == DEMO:
                models = {DEMO_MODEL.id: DEMO_MODEL}
            models.update(self._custom.get(provider.name, {}))
            self._models[provider.name] = models
        return models

    def discover(self, provider: Provider, found: Mapping[str, Model], wins: bool = False) -> None:
        """Takes the list that the provider's own server gave; what is known otherwise is better, unless `wins`."""
        if not self.is_discovered(provider):
            self.models_of(provider)
        self._found[provider.name] = (found, wins)
        known = self._models[provider.name]
        merged = {**known, **found} if wins else {**found, **known}
        self._discovered[provider.name] = merged

    def adopt(self, earlier: Catalogue) -> None:
        """Keeps the lists that servers gave to an earlier catalogue, where their provider is the same."""
        for name, found in earlier._found.items():
            if self.providers.get(name) == earlier.providers.get(name):
                self.discover(self.providers[name], *found)

    def is_discovered(self, provider: Provider) -> bool:
        """Whether the provider's own list has been seen."""
        return provider.name in self._discovered

    def is_allowed(self, model: Model) -> bool:
        """Whether the allow and deny lists let this model be used; entries are provider/id or bare ids."""
        names = {model.full_id, model.id}
        return (self._allow is None or bool(names & set(self._allow))) and not names & set(self._deny)

    def listing(self, usable: Callable[[Provider], bool]) -> List[Model]:
        """The models of the usable providers, by id."""
        models = [model for provider in self.providers.values() if provider.name != DEMO and usable(provider)
                  for model in self.models_of(provider).values() if self.is_allowed(model)]
        if (self._show_demo or not models) and self.is_allowed(DEMO_MODEL):
            models.append(DEMO_MODEL)
        return sorted(models, key=lambda model: model.full_id)

    def resolve(self, name: str, usable: Callable[[Provider], bool]) -> Model:
        """The model that a client's name means: provider/id, or a bare id at the first usable provider that has it, either
        with a level of thinking behind a colon. An id that the catalogue lacks is taken at a known provider's word.
        Raises `ModelNotFound`."""
        base, colon, suffix = name.rpartition(":")
        level = LEVEL_SUFFIXES.get(suffix.lower()) if colon else None
        model = self._find(name, usable)
        if model is None and level:
            model = self._find(base, usable) or self._unlisted(base)
            model = model and replace(model, level=level)
        model = model or self._unlisted(name)
        if model is None or not self.is_allowed(model):
            raise ModelNotFound(self._not_found(name, usable), param="model")
        return model

    def _find(self, name: str, usable: Callable[[Provider], bool]) -> Optional[Model]:
        provider_name, slash, model_id = name.partition("/")
        provider = self.providers.get(provider_name)
        if slash and provider and model_id in self.models_of(provider):
            return self.models_of(provider)[model_id]
        if name == DEMO:
            return DEMO_MODEL
        holders = [provider for provider in self.providers.values()
                   if provider.name != DEMO and name in self.models_of(provider)]
        usable_holders = [provider for provider in holders if usable(provider)]
        chosen = next((provider for provider in usable_holders if self.is_allowed(self.models_of(provider)[name])),
                      next(iter(usable_holders or holders), None))
        return self.models_of(chosen)[name] if chosen else None

    def _unlisted(self, name: str) -> Optional[Model]:
        provider_name, _, model_id = UNLISTED.get(name, name).partition("/")
        provider = self.providers.get(provider_name)
        if provider is None or not model_id or provider.name == DEMO or len(model_id) > 1000:
            return None
        return unlisted_model(provider, model_id)

    def _not_found(self, name: str, usable: Callable[[Provider], bool]) -> str:
        ids = [model.full_id for model in self.listing(usable)]
        near = difflib.get_close_matches(name[:200], ids + [listed.partition("/")[2] for listed in ids], 1, 0.6)
        hint = f'; did you mean "{near[0]}"?' if near else "; GET /v1/models lists what there is"
        return f'no model "{name[:200]}" here{hint}'


DISCOVERED_WINDOW = ("context_length", "context_window", "max_model_len", "max_context_length", "max_input_tokens",
                     "inputTokenLimit")


def read_model_list(body: Mapping[str, Any], provider: Provider) -> Dict[str, Model]:
    """The models in a server's answer to GET /models, by id, with the limits that some servers add: OpenRouter, vLLM,
    LM Studio, llama.cpp, Vercel, Hugging Face and Anthropic each in its own way."""
    items = body.get("data")
    if not isinstance(items, list):
        items = body.get("models") if isinstance(body.get("models"), list) else []
    models = {}
    for item in items:
        model_id = as_dict(item).get("id") or as_dict(item).get("name")
        if not isinstance(model_id, str) or not model_id:
            continue
        window = next((token_count(item[name]) for name in DISCOVERED_WINDOW if item.get(name)), 0)
        meta, top = as_dict(item.get("meta")), as_dict(item.get("top_provider"))
        modalities = as_dict(item.get("architecture")).get("input_modalities")
        parameters = item.get("supported_parameters")
        models[model_id] = unlisted_model(
            provider, model_id, name=item.get("display_name") or item.get("name") or "",
            context_window=window or token_count(meta.get("n_ctx") or meta.get("n_ctx_train")),
            max_tokens=token_count(top.get("max_completion_tokens") or item.get("max_tokens")),
            input=tuple(modalities) if isinstance(modalities, list) else None,
            reasoning="reasoning" in parameters if isinstance(parameters, list) else None)
    return {model_id: borrow_claude(model, provider) for model_id, model in models.items()}


def borrow_claude(model: Model, provider: Provider) -> Model:
    """A Claude model that an aggregator lists, with what the catalogue knows of Claude, over the aggregator's Messages
    endpoint where it has one: only there do thinking and its signatures survive."""
    own_id = model.id[len("anthropic/"):].replace(".", "-") if model.id.startswith("anthropic/") else ""
    line = next((line for line in MODELS["anthropic"].split("\n") if line.partition("|")[0] == own_id), "")
    if not own_id or not line:
        return model
    claude = parse_model_line(line, PROVIDERS["anthropic"])
    endpoint = provider.endpoints.get(AnthropicMessages.name)
    model = replace(model, reasoning=claude.reasoning, thinking_levels=claude.thinking_levels,
                    compat={**claude.compat, **model.compat})
    return replace(model, protocol=AnthropicMessages.name, base_url=endpoint) if endpoint else model


# Copilot says of each model at which paths it can be called; the first of these that it names is the best.
COPILOT_ENDPOINTS = {"/v1/messages": "anthropic-messages", "/responses": "openai-responses",
                     "/chat/completions": "openai-completions"}


def read_copilot_models(body: Mapping[str, Any], provider: Provider, known: Mapping[str, Model]) -> Dict[str, Model]:
    """The models in Copilot's answer to GET /models that its user may call, each with the protocol that its
    `supported_endpoints` name; facts of `known` models are kept."""
    models = {}
    for item in map(as_dict, body.get("data") or ()):
        model_id, capabilities = item.get("id"), as_dict(item.get("capabilities"))
        if not isinstance(model_id, str) or as_dict(item.get("policy")).get("state") == "disabled" or (
                capabilities.get("type", "chat") != "chat"):
            continue
        paths = item.get("supported_endpoints") or ["/chat/completions"]
        protocol = next((name for path, name in COPILOT_ENDPOINTS.items() if path in paths), None)
        if protocol is None:
            continue
        limits, supports = as_dict(capabilities.get("limits")), as_dict(capabilities.get("supports"))
        model = known.get(model_id) or unlisted_model(
            provider, model_id, name=item.get("name") or "",
            context_window=token_count(limits.get("max_context_window_tokens")),
            max_tokens=token_count(limits.get("max_output_tokens")),
            input=("text", "image") if supports.get("vision") else ("text",))
        models[model_id] = replace(model, protocol=protocol, base_url=provider.endpoints[protocol])
    return models


# --- The model map ----------------------------------------------------------------------------------------------------
#
# `modelMap` with the rules of piai-router 0.1.3, and two more: a name may hold `*`, and a value may be a chain.


class Route(NamedTuple):
    """Where a client's name leads: a model's name, the step that found it, and what becomes of the client's level of
    thinking: a map of levels, one level for all, None when it stays."""

    model: str
    reason: str
    effort: Any = None


# A client's level as the maps name it, and what a map's target means.
MAP_EFFORTS = {"off": "none", "minimal": "low", "low": "low", "medium": "medium", "high": "high", "xhigh": "max",
               "max": "max"}
CLAUDE_ALIAS = "claude-gw-"         # claude-gw-<provider>--<model>, for clients that only list names with "claude"


class ModelMap:
    """A client's names → models, for the provider that is in charge, "" for none."""

    def __init__(self, entries: Mapping[str, Any], provider: str = "", default_model: str = "") -> None:
        self._entries = entries
        self._provider = provider
        self._default = default_model

    def routes(self, name: str) -> List[Route]:
        """The models to try in turn; the first step that leads anywhere counts."""
        name = name.strip()
        for reason, key, rest in self._steps(name):
            routes = self._read(self._entries[key], f"{reason}:{key}")
            if routes:
                return [route._replace(model=route.model.replace("*", rest)) for route in routes] if rest else routes
        return [Route(*self._fallback(name))]

    def _steps(self, name: str) -> Iterator[Tuple[str, str, str]]:
        """(step, key, what `*` stands for) of the entries that fit, the best first."""
        entries, provider = self._entries, self._provider
        if name and provider and f"{provider}:{name}" in entries:
            yield "exact_provider", f"{provider}:{name}", ""
        if name in entries and name:
            yield "exact", name, ""
        owned = [(key, *split_key(key)) for key in entries if key and key != "default"] if name else []
        for key, owner, stem in owned:
            rest = match_wildcard(stem, name) if owner in ("", provider) else None
            if rest is not None:
                yield "wildcard", key, rest
        for reason, wanted in (("prefix_provider", provider), ("prefix", "")):
            for key, owner, stem in owned:
                if owner == wanted and (owner or reason == "prefix") and name.startswith(stem):
                    yield reason, key, ""
        if "default" in entries:
            yield "default", "default", ""

    def _read(self, entry: Any, reason: str, is_variant: bool = False) -> List[Route]:
        """The routes that an entry means; none when it says nothing for this provider."""
        if isinstance(entry, list):
            return [route for item in entry for route in self._read(item, reason, is_variant)]
        if isinstance(entry, str):
            return [Route(entry.strip(), reason)] if entry.strip() else []
        entry = as_dict(entry)
        effort = entry.get("reasoning") if entry.get("reasoning") is not None else entry.get("effort")
        if effort is None and not any(isinstance(entry.get(name), str) for name in ("model", "target", "to")):
            variant = entry.get(self._provider) if self._provider in entry else entry.get("default")
            return [] if is_variant or variant is None else self._read(variant, reason, True)
        model = next((entry[name] for name in ("model", "target", "to") if isinstance(entry.get(name), str)
                      and entry[name].strip()), "")
        return [Route(model.strip(), reason, effort)] if model else []

    def _fallback(self, name: str) -> Tuple[str, str]:
        provider, default = self._provider.lower(), self._default
        if default and name.startswith("claude-") and "openai" in provider:
            return default, "fallback_family_mismatch_openai"
        if default and name.startswith(("gpt", "o1", "o3")) and "anthropic" in provider:
            return default, "fallback_family_mismatch_anthropic"
        if name:
            return name, "passthrough"
        return (default, "fallback_model") if default else ("gpt-5" if provider else "", "hard_default")

    def aliases(self) -> List[str]:
        """The names that the map adds for clients: its keys that are whole names."""
        keys = [split_key(key) for key in self._entries if key and key != "default"]
        return list(dict.fromkeys(stem for owner, stem in keys if owner in ("", self._provider) and "*" not in stem))

    def targets(self) -> List[str]:
        """The models that its entries lead to."""
        entries = [route.model for key in self._entries for route in self._read(self._entries[key], "")]
        return list(dict.fromkeys([*([self._default] if self._default else []), *entries]))


def split_key(key: str) -> Tuple[str, str]:
    """A key of the map as (provider, name); "" for one that serves all."""
    provider, _, name = key.partition(":")
    return (provider.strip(), name.strip()) if provider.strip() and name.strip() else ("", key)


def match_wildcard(pattern: str, name: str) -> Optional[str]:
    """What the first `*` of a pattern stands for in a name, None when the name does not fit."""
    if "*" not in pattern:
        return None
    match = re.fullmatch("(.*)".join(map(re.escape, pattern.split("*"))), name, re.DOTALL)
    return match.group(1) if match else None


def map_effort(effort: Any, level: Optional[str]) -> Optional[str]:
    """The level of `LEVELS` that a route's map makes of the client's; None when it has no say."""
    if isinstance(effort, dict):
        named = {MAP_EFFORTS.get(LEVEL_ALIASES.get(str(name).lower(), ""), str(name).lower()): target
                 for name, target in effort.items()}
        known = MAP_EFFORTS.get(level or "")
        effort = named.get(known) if known and read_target(named.get(known)) else named.get("default")
    return read_target(effort)


def read_target(word: Any) -> Optional[str]:
    """A target of an effort map as a level; None for what is none."""
    level = LEVEL_ALIASES.get(word.strip().lower()) if isinstance(word, str) else None
    return "xhigh" if level == "max" else level


# --- models.json ------------------------------------------------------------------------------------------------------

_PROVIDER_KEYS = {"name": "a string", "baseUrl": "a string", "api": "a string", "apiKey": "a string",
                  "headers": "an object", "authHeader": "a boolean", "compat": "an object", "models": "an array",
                  "modelOverrides": "an object"}
_MODEL_KEYS = {"id": "a string", "name": "a string", "api": "a string", "baseUrl": "a string", "reasoning": "a boolean",
               "input": "an array", "cost": "an object", "contextWindow": "a number", "maxTokens": "a number",
               "headers": "an object", "compat": "an object", "thinkingLevelMap": "an object",
               "samplingParams": "an object"}
_NESTED_COMPAT = ("openRouterRouting", "vercelGatewayRouting", "chatTemplateKwargs", "chatTemplateArgs")


class ModelsFile(NamedTuple):
    """models.json, read: all providers, built in and the user's own; the user's models; what could not be used."""

    providers: Dict[str, Provider]
    custom: Dict[str, Dict[str, Model]]
    problems: List[str]


def read_models_file(data: Mapping[str, Any]) -> ModelsFile:
    """pi's models.json over the built-in table. A provider that cannot be used is left out and named in `problems`;
    unknown properties are pi's business and ignored. Raises `BadRequest` naming the key when the whole is malformed."""
    entries = required(data, "providers", "an object")
    result = ModelsFile(dict(PROVIDERS), {}, [])
    for name, entry in entries.items():
        path = f"providers.{name}"
        try:
            _read_provider(result, name, check(entry, "an object", path), path)
        except BadRequest as error:
            result.problems.append(error.message)
    return result


def _read_provider(result: ModelsFile, name: str, entry: Dict[str, Any], path: str) -> None:
    fields = {key: optional(entry, key, kind, path) for key, kind in _PROVIDER_KEYS.items()}
    for key in entry:                           # pi ignores what it does not know; a slip of the pen is worth a word
        near = difflib.get_close_matches(key, _PROVIDER_KEYS, 1, 0.7) if key not in _PROVIDER_KEYS else []
        result.problems.extend(f'{path}: unknown key "{key}"; did you mean "{name}"?' for name in near)
    if not re.fullmatch(r"[^/\s]+", name) or name == DEMO:
        raise BadRequest(f"{path}: a provider's name may not be empty, be {DEMO!r} or hold a slash or blank")
    provider = _merge_provider(name, fields, path, PROVIDERS.get(name))
    base = Catalogue({name: provider}).models_of(provider)
    models: Dict[str, Model] = {}
    for where, item in objects(fields["models"] or [], f"{path}.models"):
        model = _read_model(provider, item, where, None)
        models[model.id] = model
    for model_id, item in (fields["modelOverrides"] or {}).items():
        known = models.get(model_id) or base.get(model_id)
        where = f"{path}.modelOverrides.{model_id}"
        if known:
            models[model_id] = _read_model(provider, {**check(item, "an object", where), "id": model_id}, where, known)
    result.providers[name] = provider
    result.custom[name] = models


def _merge_provider(name: str, fields: Mapping[str, Any], path: str, known: Optional[Provider]) -> Provider:
    base_url, api = fields["baseUrl"], fields["api"]
    if known is None and not base_url and not any(as_dict(m).get("baseUrl") for m in fields["models"] or ()):
        raise BadRequest(f"{path}.baseUrl: required for a provider that is not built in")
    endpoints = dict(known.endpoints) if known else {}
    if base_url:
        check_url(base_url, f"{path}.baseUrl")
        endpoints = {protocol: base_url for protocol in endpoints}
    default = api or next(iter(endpoints), OpenAICompletions.name)
    if default not in UPSTREAM_PROTOCOLS:
        raise BadRequest(f"{path}.api: {default!r} is not supported; known: {', '.join(UPSTREAM_PROTOCOLS)}")
    endpoints = {default: base_url or endpoints.get(default, ""), **endpoints}
    compat = {**(known.compat if known else compat_of_host(base_url or "")), **(fields["compat"] or {})}
    headers = {header: check(value, "a string", f"{path}.headers.{header}")
               for header, value in {**(known.headers if known else {}), **(fields["headers"] or {})}.items()}
    return Provider(
        name, endpoints, env=known.env if known else (), headers=headers, compat=compat,
        discover=known.discover if known else not fields["models"], models=known.models if known else "",
        auth=known.auth if known else "", source=known.source if known else PROTOCOL_SOURCES.get(default, ""),
        keyless=known is None, auth_header=bool(fields["authHeader"]),
        api_key=fields["apiKey"] or (known.api_key if known else None))


def adopt_provider(result: ModelsFile, name: str, entry: Mapping[str, Any], model_ids: Sequence[str]) -> None:
    """A provider of the gateway's own configuration (piai-router's `providers`) over what is known of it; what it says of
    models holds for `model_ids`. Raises `BadRequest`."""
    path, known = f"providers.{name}", result.providers.get(name)
    fields = {key: entry.get(key) or None for key in _PROVIDER_KEYS}
    provider = _merge_provider(name, {**fields, "headers": {**(known.headers if known else {}), **(fields["headers"] or {})},
                                      "models": [], "modelOverrides": None}, path, known)
    provider = replace(provider, keyless=False)         # without a key of its own it gets the client's
    if entry.get("authMode") == "oauth":
        provider = replace(provider, api_key=None, auth_file=entry.get("authFile") or "", log_in=entry.get("oauthProvider") or "")
    result.providers[name] = provider
    base = Catalogue({name: provider}, result.custom).models_of(provider)
    facts = {key: entry[key] for key in ("reasoning", "input", "contextWindow", "maxTokens") if entry.get(key) is not None}
    result.custom[name] = {**result.custom.get(name, {}), **{
        model_id: _read_model(provider, {"id": model_id, **facts}, path, base.get(model_id)) for model_id in model_ids
        if model_id not in base or facts}}


# Where the credential for a provider of the user's own comes from, by the protocol it speaks; else just its key.
PROTOCOL_SOURCES = {"bedrock-converse-stream": "aws", "google-vertex": "google", "azure-openai-responses": "azure",
                    "google-gemini-cli": "code-assist"}


def compat_of_host(base_url: str) -> Mapping[str, Any]:
    """The compat flags for a server known only by its address: those of the built-in provider at the same host, or of
    the servers people run at home."""
    host = urllib.parse.urlsplit(base_url).hostname or ""
    for provider in PROVIDERS.values():
        if any(urllib.parse.urlsplit(url).hostname == host for url in provider.endpoints.values()):
            return provider.compat
    is_local = host in LOOPBACK_HOSTS or host.startswith(("10.", "192.168.", "127.")) or "." not in host
    return LOCAL_COMPAT if is_local or host.endswith((".local", ".lan")) else {}


def _read_model(provider: Provider, item: Dict[str, Any], path: str, known: Optional[Model]) -> Model:
    """An entry of `models` (then `known` is None and it replaces what was there) or of `modelOverrides`."""
    fields = {key: optional(item, key, kind, path) for key, kind in _MODEL_KEYS.items()}
    if not fields["id"]:
        raise BadRequest(f"{path}.id: Field required")
    protocol = fields["api"] or (known.protocol if known else provider.protocol)
    if protocol not in UPSTREAM_PROTOCOLS:
        raise BadRequest(f"{path}.api: {protocol!r} is not supported; known: {', '.join(UPSTREAM_PROTOCOLS)}")
    base = known or unlisted_model(provider, fields["id"])
    _check_model(fields, path)
    compat = dict(base.compat)
    for key, value in (fields["compat"] or {}).items():
        compat[key] = {**as_dict(compat.get(key)), **value} if key in _NESTED_COMPAT else value
    levels = {**base.thinking_levels, **(fields["thinkingLevelMap"] or {})}
    return replace(
        base, protocol=protocol, compat=compat, headers={**base.headers, **(fields["headers"] or {})},
        base_url=fields["baseUrl"] or provider.endpoints.get(protocol) or base.base_url, sampling={
            **base.sampling, **(fields["samplingParams"] or {})},
        thinking_levels=levels, cost=_read_cost(fields["cost"], base.cost, path),
        **present(name=fields["name"], reasoning=fields["reasoning"],
                  context_window=fields["contextWindow"] and int(fields["contextWindow"]),
                  max_tokens=fields["maxTokens"] and int(fields["maxTokens"]),
                  input=fields["input"] and tuple(fields["input"])))


def _check_model(fields: Mapping[str, Any], path: str) -> None:
    """What the kinds in `_MODEL_KEYS` leave open."""
    texts = {**{f"headers.{name}": text for name, text in (fields["headers"] or {}).items()},
             **{f"input[{index}]": word for index, word in enumerate(fields["input"] or ())},
             **{f"thinkingLevelMap.{level}": word for level, word in (fields["thinkingLevelMap"] or {}).items()
                if word is not None}}
    for name, text in texts.items():
        check(text, "a string", f"{path}.{name}")
    for name in _NESTED_COMPAT:
        optional(fields["compat"] or {}, name, "an object", f"{path}.compat")
    if fields["baseUrl"]:
        check_url(fields["baseUrl"], f"{path}.baseUrl")


def _read_cost(cost: Optional[Dict[str, Any]], base: Tuple[float, ...], path: str) -> Tuple[float, ...]:
    """Prices over those that are known, field by field."""
    if cost is None:
        return base
    known = dict(zip(COST_FIELDS, base))
    prices = {name: optional(cost, name, "a number", f"{path}.cost", 0) for name in COST_FIELDS}
    return tuple(float(known.get(name, 0) if prices[name] is None else prices[name]) for name in COST_FIELDS)


COST_FIELDS = ("input", "output", "cacheRead", "cacheWrite")


# ======================================================================================================================
# §10 Credentials
# ======================================================================================================================

_INTERPOLATION = re.compile(r"\$(?:(\$)|(!)|([A-Za-z_][A-Za-z0-9_]*)|\{([A-Za-z_][A-Za-z0-9_]*)\})")
_PLACEHOLDER = re.compile(r"\{([A-Z][A-Z0-9_]*)\}")
AZURE_VARIABLES = {"base_url": "AZURE_OPENAI_BASE_URL", "resource": "AZURE_OPENAI_RESOURCE_NAME",
                   "api_version": "AZURE_OPENAI_API_VERSION", "deployment_map": "AZURE_OPENAI_DEPLOYMENT_NAME_MAP"}
SENTINEL = "<authenticated>"        # pi's mark for ambient cloud credentials; never a key


def open_text(path: str) -> TextIO:
    """A configuration file, opened for reading; not a pipe or device, which might never end. Raises OSError."""
    if os.path.exists(path) and not os.path.isfile(path):
        raise OSError(errno.EINVAL, "not a regular file")
    return open(path, encoding="utf-8-sig")


AUTH_TRIES, AUTH_PAUSE_S = 12, 0.02


def read_object(path: str, parse: Callable[[str], Any] = json.loads) -> Dict[str, Any]:
    """The object in a JSON file, {} when there is no file or nothing in it. pi rewrites its files in place, so a reader
    may find half of one, or none of it: such a moment is waited out. Raises ValueError that says what is wrong."""
    problem = ""
    for _ in range(AUTH_TRIES):
        try:
            with open_text(path) as file:
                text = file.read()
            content = parse(text) if text.strip() else None
            if isinstance(content, dict):
                return content
            problem = "it must hold a JSON object" if text.strip() else ""
        except FileNotFoundError:
            return {}
        except (ValueError, RecursionError):
            problem = "it is not valid JSON"
        except OSError as error:
            problem = describe(error)
        time.sleep(AUTH_PAUSE_S)
    if problem:
        raise ValueError(problem)
    return {}


class FileCache:
    """A JSON object file, read again when it changes. One that stays broken leaves the last good content in force."""

    def __init__(self, path: str, parse: Callable[[str], Any] = json.loads) -> None:
        self.path = path
        self._parse = parse
        self._lock = threading.Lock()
        self._seen: Any = None
        self._content: Dict[str, Any] = {}

    def read(self) -> Dict[str, Any]:
        """The file's content, {} when there is none."""
        with self._lock:
            identity = self.identify()
            if identity != self._seen:
                content = self._load() if identity else {}
                if content is not None:
                    self._content = content
                self._seen = identity
            return self._content

    def identify(self) -> Any:
        """What changes when the file does; None when there is none."""
        try:
            stat = os.stat(self.path)
        except OSError:
            return None
        return stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns

    def _load(self) -> Optional[Dict[str, Any]]:
        try:
            return read_object(self.path, self._parse)
        except ValueError:
            log.warning("%s cannot be read as JSON; going on with %s", self.path,
                        "what was read before" if self._content else "nothing from it")
            return None


# --- auth.json --------------------------------------------------------------------------------------------------------
#
# pi owns this file and keeps it under a lock of proper-lockfile's kind. We keep to the same rules, so that nobody's
# refresh token is used twice and nobody's entry is lost.

LOCK_STALE_S = 30.0                 # a lock not touched for so long is dead: what pi itself waits before it steals one
LOCK_BEAT_S = 2.0                   # pi's synchronous callers already steal after 10
LOCK_WAIT_S = 40.0                  # longer than LOCK_STALE_S, so that a dead holder is outlived
LOCK_JOIN_S = 5.0                   # so long threads of this process may join a lock that is held; then others have a turn
LOCK_POLL_S = 0.25                  # the longest pause between two tries
TEMPORARY_S = 300.0                 # what a killed writer left behind is removed after this


class FileLock:
    """pi's lock on a file: the directory `<path>.lock`, which its holder makes, touches while he lives and removes.

    Threads of one process share it, so that one that waits for a provider does not hold up the others."""

    def __init__(self, path: str) -> None:
        path = os.path.abspath(path)
        named = os.path.join(os.path.realpath(os.path.dirname(path)), os.path.basename(path))
        target = os.path.realpath(path)         # pi 0.58 refreshes under the lock of a link's target
        self._name = os.path.basename(path) + ".lock"
        self._folders = [path + ".lock"] + ([target + ".lock"] if target != named else [])
        self._guard = threading.Condition()
        self._holders = 0
        self._since = 0.0
        self._stamps: Dict[str, int] = {}
        self._released = threading.Event()
        self._own = threading.local()           # how often this very thread is inside

    @contextlib.contextmanager
    def held(self, limit_s: float = LOCK_WAIT_S) -> Iterator[None]:
        """Holds the lock. Raises `AuthFileError` when it cannot be had within `limit_s` seconds."""
        deadline = time.monotonic() + limit_s
        depth = getattr(self._own, "depth", 0)
        with self._guard:
            while not depth and self._holders and time.monotonic() - self._since > LOCK_JOIN_S:
                if not self._guard.wait(max(0.0, deadline - time.monotonic())):
                    raise AuthFileError(f"{self._name} is held for too long by this process")
            if not self._holders:
                self._acquire(deadline)
            self._holders += 1
        self._own.depth = depth + 1
        try:
            yield
        finally:
            self._own.depth = depth
            with self._guard:
                self._holders -= 1
                if not self._holders:
                    self._release()
                    self._guard.notify_all()

    def ensure(self) -> None:
        """Takes the lock anew if another program took it away from its holder. Raises `AuthFileError`."""
        with self._guard:
            if any(self._stamp(folder) != self._stamps.get(folder) for folder in self._folders):
                log.warning("%s was taken over by another program; taking it again", self._name)
                self._release()
                self._acquire(time.monotonic() + LOCK_WAIT_S)

    def _acquire(self, deadline: float) -> None:
        try:
            for folder in self._folders:
                self._stamps[folder] = self._make(folder, deadline)
        except BaseException:
            self._release()
            raise
        self._since, self._released = time.monotonic(), threading.Event()
        threading.Thread(target=self._beat, args=(self._released,), name="auth-lock", daemon=True).start()

    def _make(self, folder: str, deadline: float) -> int:
        pause_s, seen, seen_at = 0.01, 0, time.monotonic()
        while True:
            try:
                os.mkdir(folder)
                return self._stamp(folder)
            except FileExistsError:
                pass
            except OSError as error:
                raise AuthFileError(f"{self._name} cannot be made: {describe(error)}") from None
            now, stamp = time.monotonic(), self._stamp(folder)
            if stamp != seen:
                seen, seen_at = stamp, now
            # dead by its own time; or by ours, when its own lies in the future
            if stamp and (time.time() - stamp / 1e9 > LOCK_STALE_S or now - seen_at > LOCK_STALE_S + LOCK_POLL_S):
                _steal(folder, stamp)
            elif now > deadline:
                raise AuthFileError(f"{self._name} is held by another program and not given back")
            else:
                time.sleep(min(pause_s * (1 + secrets.randbelow(1000) / 1000), LOCK_POLL_S))
                pause_s *= 2
                self._touch()

    def _beat(self, released: threading.Event) -> None:
        while not released.wait(LOCK_BEAT_S):
            with self._guard:
                if not released.is_set():
                    self._touch()

    def _touch(self) -> None:
        """Shows that the holder lives; never on a lock that another program has taken over."""
        for folder, stamp in self._stamps.items():
            if self._stamp(folder) == stamp:
                with contextlib.suppress(OSError):
                    os.utime(folder)
                    self._stamps[folder] = self._stamp(folder)

    def _release(self) -> None:
        self._released.set()
        for folder, stamp in self._stamps.items():
            if self._stamp(folder) == stamp:
                with contextlib.suppress(OSError):
                    os.rmdir(folder)
        self._stamps = {}

    @staticmethod
    def _stamp(folder: str) -> int:
        """When the folder was last touched, in nanoseconds; 0 when it is not there."""
        try:
            return os.lstat(folder).st_mtime_ns
        except OSError:
            return 0


def _steal(folder: str, stamp: int) -> None:
    """Removes a dead lock; one process at a time, so that none removes what another has just made."""
    descriptor = -1
    try:
        if os.name == "posix":
            import fcntl                        # not on Windows
            descriptor = os.open(os.path.dirname(folder), os.O_RDONLY)
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if FileLock._stamp(folder) == stamp:
            log.warning("%s was left behind by a program that died; removing it", folder)
            os.rmdir(folder)
    except (FileNotFoundError, BlockingIOError):        # somebody else was first, or is about to
        pass
    except OSError as error:
        raise AuthFileError(f"{os.path.basename(folder)} was left behind and cannot be removed: {describe(error)}") from None
    finally:
        if descriptor >= 0:
            os.close(descriptor)


class AuthFile:
    """auth.json: read without the lock, changed under it, one entry at a time. What others wrote stays as it is."""

    def __init__(self, path: str) -> None:
        self.path = path
        self.lock = FileLock(path)
        self._cache = FileCache(path)
        self._writing = threading.Lock()

    def read(self) -> Dict[str, Any]:
        """The entries by provider; the last good ones while the file is broken."""
        return self._cache.read()

    def entry(self, name: str) -> Dict[str, Any]:
        """A provider's entry, {} when it has none."""
        return as_dict(self.read().get(name))

    def load(self) -> Dict[str, Any]:
        """The file as it is now; for a holder of the lock. Raises `AuthFileError` when it is not valid JSON."""
        try:
            return read_object(self.path)
        except ValueError as problem:
            raise AuthFileError(f"{os.path.basename(self.path)} cannot be read, so it is left alone: {problem}") from None

    def change(self, name: str, update: Callable[[Dict[str, Any]], Optional[Dict[str, Any]]]) -> None:
        """Puts what `update` makes of a provider's entry ({} when there is none) in its place: None removes it, an equal
        one writes nothing. Raises `AuthFileError`."""
        self._make_folder()
        with self.lock.held(), self._writing:
            self.lock.ensure()
            content = self.load()
            old = as_dict(content.get(name))
            new = update(dict(old))
            if new == old or (new is None and name not in content):
                return
            if new is None:
                del content[name]
            else:
                content[name] = new
            self._write(content)

    def check(self) -> None:
        """Raises `AuthFileError` when nothing could be changed here."""
        self._make_folder()
        with self.lock.held():
            self.load()
            self.check_writable()

    def check_writable(self) -> None:
        """Raises `AuthFileError` when a change could not be kept: better before a refresh token is spent than after."""
        target = os.path.realpath(self.path)
        self._discard(self._create(target)[1])

    def _make_folder(self) -> None:
        try:
            make_private_folder(os.path.dirname(os.path.abspath(self.path)))
        except OSError as error:
            raise AuthFileError(f"{os.path.basename(self.path)} cannot be written: {describe(error)}") from None

    def _create(self, target: str) -> Tuple[int, str]:
        """(descriptor, path) of a new file beside the target, for its owner only."""
        temporary = f"{target}.{os.getpid()}-{secrets.token_hex(4)}.tmp"
        try:
            return os.open(temporary, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600), temporary
        except OSError as error:
            raise AuthFileError(f"{os.path.basename(self.path)} cannot be written: {describe(error)}") from None

    def _discard(self, temporary: str) -> None:
        with contextlib.suppress(OSError):
            os.unlink(temporary)

    def _write(self, content: Mapping[str, Any]) -> None:
        """Replaces the file: readers see the old one or the new one, whole."""
        target = os.path.realpath(self.path)
        self._remove_leftovers(target)
        descriptor, temporary = self._create(target)
        data = render_auth(content)
        try:
            with os.fdopen(descriptor, "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
                keep_owner(target, file.fileno())
            try:
                replace_file(temporary, target)
            except OSError as error:
                if error.errno != errno.EBUSY:
                    raise
                self._discard(temporary)        # a file mounted by itself, into a container: as pi writes, in place
                write_in_place(target, data)
        except OSError as error:
            self._discard(temporary)
            raise AuthFileError(f"{os.path.basename(self.path)} cannot be written: {describe(error)}") from None
        except BaseException:
            self._discard(temporary)
            raise

    def _remove_leftovers(self, target: str) -> None:
        folder, name = os.path.split(target)
        pattern = re.compile(re.escape(name) + r"\.\d+-[0-9a-f]{8}\.tmp")
        with contextlib.suppress(OSError):
            for entry in os.scandir(folder):
                if pattern.fullmatch(entry.name) and time.time() - entry.stat().st_mtime > TEMPORARY_S:
                    self._discard(entry.path)


def write_private_file(path: str, data: bytes) -> None:
    """A file for its owner only: readers see the old one or the new one, whole. Raises OSError."""
    make_private_folder(os.path.dirname(os.path.abspath(path)))
    temporary = f"{path}.{os.getpid()}-{secrets.token_hex(4)}.tmp"
    descriptor = os.open(temporary, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600)
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(data)
        replace_file(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(temporary)
        raise


def render_auth(content: Mapping[str, Any]) -> bytes:
    """auth.json as pi writes it: two blanks deep, letters as they are, no line end behind it."""
    try:
        return json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False).encode("utf-8")
    except UnicodeEncodeError:                  # half of a surrogate pair, which only an escape can hold
        return json.dumps(content, indent=2, allow_nan=False).encode("ascii")
    except ValueError:
        raise AuthFileError("there is a number too large to be written again") from None


def make_private_folder(path: str) -> None:
    """A folder, and those above it that are missing, for their owner only. Raises OSError."""
    if os.path.isdir(path):
        return
    make_private_folder(os.path.dirname(path))
    with contextlib.suppress(FileExistsError):
        os.mkdir(path, 0o700)


def write_in_place(path: str, data: bytes) -> None:
    """Overwrites a file that cannot be replaced. Raises OSError."""
    with open(path, "r+b") as file:
        file.write(data)
        file.truncate()
        file.flush()
        os.fsync(file.fileno())


def keep_owner(target: str, descriptor: int) -> None:
    """The replacement belongs to whom the file belongs to, where an administrator runs this on another's file."""
    if os.name == "posix" and os.path.exists(target):
        old = os.stat(target)
        if (old.st_uid, old.st_gid) != (os.geteuid(), os.getegid()):
            with contextlib.suppress(OSError):
                os.fchown(descriptor, old.st_uid, old.st_gid)


def replace_file(temporary: str, target: str) -> None:
    """`os.replace`, with patience for readers on Windows, which keep a file from being replaced. Raises OSError."""
    for _ in range(AUTH_TRIES):
        try:
            return os.replace(temporary, target)
        except PermissionError:
            if os.name == "posix":
                raise
            time.sleep(AUTH_PAUSE_S)
    os.replace(temporary, target)


# --- Subscriptions ----------------------------------------------------------------------------------------------------
#
# Plans that people log in to. Client ids and secrets below are those of the vendors' own installed programs: public, and
# no secret to anybody.

VENDOR_LIMIT_S = 15.0               # one call to a vendor, from its first byte to its last: the lock is held meanwhile
VENDOR_CONNECT_S = 5.0
REFRESH_EARLY_S = 300.0             # a token is renewed so long before it ends, or a tenth of its life if that is less
REFRESH_FAILED_S = 15.0             # a failure is told again for so long before the vendor is asked again
REFRESH_OVER_S = 300.0              # and a log-in that is over, unless its entry changes
REFRESH_FORCED_S = 60.0             # a token that the provider refused is renewed no more often than this
HANGING_S = 2.0                     # a failure that took longer keeps other processes from asking, too
HANGING_WAIT_S = 30.0
FAILURES_FILE = "pigateway-renewals.json"   # beside auth.json: the last renewal that failed, for other processes
SAVE_AGAIN_S = 5.0                  # until auth.json can be written again
NEVER_MS = 2 ** 53 - 1              # how pi writes "does not expire"
CODEX_REDIRECT = "http://localhost:1455/auth/callback"
DEVICE_GRANT = "urn:ietf:params:oauth:grant-type:device_code"
COPILOT_HEADERS = MappingProxyType({name.lower(): value for name, value in PROVIDERS["github-copilot"].headers.items()})


class VendorReply(NamedTuple):
    """A vendor's answer: its status, and its JSON object ({} when it is none)."""

    status: int
    fields: Dict[str, Any]
    retry_after: Optional[float] = None

    @property
    def ok(self) -> bool:
        """Whether it did what was asked."""
        return 200 <= self.status < 300

    @property
    def error(self) -> str:
        """The vendor's word for what is wrong (RFC 6749 §5.2, or as OpenAI nests it), "" for none."""
        error = self.fields.get("error")
        code = error if isinstance(error, str) else as_dict(error).get("code") or as_dict(error).get("type")
        return code if isinstance(code, str) else ""

    @property
    def said(self) -> str:
        """What is wrong, for a person."""
        words = self.fields.get("error_description") or as_dict(self.fields.get("error")).get("message") or self.error
        return redact(printable(str(words)))[:300] if words else f"status {self.status}"


def printable(text: str) -> str:
    """`text` without control characters, which a terminal would obey."""
    return "".join(character if character.isprintable() else " " for character in text)


SECRET_FIELDS = frozenset({"code", "code_verifier", "refresh_token", "device_code", "client_secret", "access_token",
                           "id_token", "token", "key", "api_key", "authorization_code", "device_auth_id", "state"})


class Vendor:
    """HTTP with those who issue tokens. Raises `UpstreamError` when no answer comes."""

    def __init__(self, transport: Transport, clock: Callable[[], float] = time.time,
                 pause: Callable[[float], None] = time.sleep) -> None:
        self._transport = transport
        self.secrets: Optional[List[str]] = None    # a list, to keep what has gone to and fro and may not be shown
        self.clock = clock
        self.pause = pause                      # between two questions whether somebody is done

    def get(self, url: str, headers: Mapping[str, str], limit_s: float = VENDOR_LIMIT_S) -> VendorReply:
        """Asks for something."""
        return self._send(Call("GET", url, {"accept": "application/json", "user-agent": USER_AGENT, **headers}), limit_s)

    def post(self, url: str, fields: Mapping[str, Any], headers: Mapping[str, str] = MappingProxyType({}),
             as_json: bool = False, limit_s: float = VENDOR_LIMIT_S) -> VendorReply:
        """Sends a form, or a JSON object."""
        kind = "application/json" if as_json else "application/x-www-form-urlencoded"
        body = dumps(fields) if as_json else urllib.parse.urlencode(fields)
        headers = {"content-type": kind, "accept": "application/json", "user-agent": USER_AGENT, **headers}
        self._note(fields)
        return self._send(Call("POST", url, headers, body.encode("ascii")), limit_s)

    def _send(self, call: Call, limit_s: float) -> VendorReply:
        scope = Scope()
        host = urllib.parse.urlsplit(call.url).hostname
        timer = threading.Timer(limit_s, scope.cancel, [UpstreamTimeout(f"no answer from {host} in {limit_s:g} seconds")])
        timer.daemon = True
        timer.start()
        try:
            response = self._transport.open(call, scope)
            try:
                body = response.read(MAX_ERROR_BYTES * 16)
            finally:
                response.close()
        finally:
            timer.cancel()
        try:
            fields = as_dict(json.loads(body))
        except (ValueError, RecursionError):
            fields = {}
        self._note(fields)
        return VendorReply(response.status, fields, parse_retry_after(response.headers, self.clock()))

    def _note(self, fields: Mapping[str, Any]) -> None:
        if self.secrets is not None:
            values = [value for name, value in fields.items() if name in SECRET_FIELDS and isinstance(value, str)]
            self.secrets.extend(form for value in values if len(value) >= 6
                                for form in (value, urllib.parse.quote(value, safe=""), urllib.parse.quote(value)))


@dataclass(frozen=True)
class Subscription:
    """A plan that people log in to, a row of `SUBSCRIPTIONS`: where its tokens come from and how they are renewed.

    `redirect` is where the browser comes back to, `secret` is in base64, `margin_s` is how much earlier than the vendor
    says a token is noted to end. `terms` says what the vendor allows, when that is less than this program can do, and
    `accepted` what it has nothing against. `account_fields` of an entry stay the same while its tokens change."""

    provider: str
    title: str
    client_id: str = ""
    token_url: str = ""
    authorize_url: str = ""
    redirect: str = ""
    scope: str = ""
    parameters: Mapping[str, str] = field(default_factory=dict)
    secret: str = ""
    as_json: bool = False
    margin_s: float = 300.0
    device_url: str = ""
    device_fields: Mapping[str, str] = field(default_factory=dict)
    terms: str = ""
    is_personal: bool = False                   # whatever opens it is somebody's plan, not a key
    accepted: str = "an API key, or the vendor's own program"
    account_fields: Tuple[str, ...] = ()

    @property
    def has_domain(self) -> bool:
        """Whether a company can have a server of its own."""
        return "{domain}" in self.device_url

    def ask(self, vendor: Vendor, grant_type: str, **fields: str) -> VendorReply:
        """A request to the token endpoint."""
        fields = {"grant_type": grant_type, "client_id": self.client_id, **fields}
        if self.secret:
            fields["client_secret"] = base64.b64decode(self.secret).decode("ascii")
        return vendor.post(self.token_url, fields, as_json=self.as_json)

    def exchange(self, vendor: Vendor, code: str, verifier: str, redirect: str, state: str) -> Dict[str, Any]:
        """The entry for a code that a log-in ended with. Raises `LogInOver`, `UpstreamError`."""
        extra = {"state": state} if self.as_json else {}
        reply = self.ask(vendor, "authorization_code", code=code, redirect_uri=redirect, code_verifier=verifier, **extra)
        return self.complete(self.read(self.accept(reply), vendor.clock()), vendor)

    def renew(self, entry: Mapping[str, Any], vendor: Vendor) -> Dict[str, Any]:
        """The fields of an entry that change when its token is renewed. Raises `LogInOver`, `UpstreamError`."""
        reply = self.ask(vendor, "refresh_token", refresh_token=self.refresh_token(entry))
        return self.read(self.accept(reply), vendor.clock(), entry)

    def complete(self, entry: Dict[str, Any], vendor: Vendor) -> Dict[str, Any]:
        """A new entry with what else belongs into it."""
        return entry

    def refresh_token(self, entry: Mapping[str, Any]) -> str:
        """What the entry is renewed with. Raises `LogInOver` when it has nothing."""
        token = entry.get("refresh")
        if not isinstance(token, str) or not token:
            raise self.over("it cannot be renewed")
        return token

    def over(self, reason: str) -> LogInOver:
        """The error that only a new log-in helps against."""
        error = LogInOver(f'the log-in for "{self.provider}" is no longer valid ({reason}); {log_in_advice(self.provider)}')
        error.reason = reason
        return error

    def accept(self, reply: VendorReply) -> Dict[str, Any]:
        """The fields of an answer that is good. Raises what a bad one means."""
        if reply.ok and reply.fields:
            return reply.fields
        if reply.status in (401, 403) or reply.error in OVER_WORDS:
            raise self.over(reply.said)
        if 300 <= reply.status < 400 or reply.ok:
            raise UpstreamProtocolError(f"{self.title}: the log-in server's answer (status {reply.status}) makes no sense")
        raise UpstreamError(f"{self.title}: the log-in server failed: {reply.said}", retry_after=reply.retry_after)

    def read(self, fields: Mapping[str, Any], now: float, old: Mapping[str, Any] = MappingProxyType({})) -> Dict[str, Any]:
        """An entry from a token endpoint's answer; the old refresh token stays when no new one came."""
        access, refresh = fields.get("access_token"), fields.get("refresh_token") or old.get("refresh")
        if not all(isinstance(token, str) and token and token.isascii() and token.isprintable()
                   for token in (access, refresh)):
            raise UpstreamProtocolError(f"{self.title}: the log-in server answered without a token")
        return {"type": "oauth", "access": access, "refresh": refresh,
                "expires": self.expiry(fields.get("expires_in"), now)}

    def expiry(self, life: Any, now: float) -> int:
        """When a token that lives for so many seconds is to be renewed, in epoch milliseconds."""
        seconds = number_of(life) or 3600.0
        return int((now + seconds - min(self.margin_s, seconds / 10)) * 1000)


OVER_WORDS = frozenset({"invalid_grant", "invalid_token", "access_denied", "unauthorized_client", "token_expired",
                        "refresh_token_expired", "refresh_token_reused", "refresh_token_invalidated"})


def expiry_of(entry: Mapping[str, Any]) -> float:
    """When an entry's token ends, in epoch seconds; infinity when it does not, or does not say."""
    try:
        expires = entry.get("expires")
        known = isinstance(expires, (int, float)) and not isinstance(expires, bool) and expires == expires
        return expires / 1000 if known and expires < NEVER_MS else math.inf
    except OverflowError:
        return math.inf


def log_in_advice(provider: str) -> str:
    """What to type."""
    return f"run: {'python' if os.name == 'nt' else 'python3'} {NAME}.py login {provider}"


def number_of(value: Any) -> float:
    """A positive number, which some vendors write as a string; 0 for anything else."""
    try:
        number = 0.0 if isinstance(value, bool) else float(value)
        return number if 0 < number < 1e12 else 0.0
    except (TypeError, ValueError, OverflowError):
        return 0.0


class CodexSubscription(Subscription):
    """ChatGPT: the token names the account that calls are made for. Its device flow is the vendor's own."""

    def read(self, fields: Mapping[str, Any], now: float, old: Mapping[str, Any] = MappingProxyType({})) -> Dict[str, Any]:
        """See `Subscription.read`."""
        entry = super().read(fields, now, old)
        try:
            return {**entry, "accountId": codex_account(entry["access"])}
        except Unauthorized:
            if not old:
                raise
            return entry                        # a spent refresh token must have its successor, whatever else is wrong


class OpenAISubscription(Subscription):
    """Sign in with ChatGPT at the provider openai: each log-in has a client id of its own, kept in the entry."""

    def renew(self, entry: Mapping[str, Any], vendor: Vendor) -> Dict[str, Any]:
        """See `Subscription.renew`."""
        client_id = entry.get("clientId")
        if not isinstance(client_id, str):
            raise self.over("its entry has no clientId")
        reply = vendor.post(self.token_url, {
            "grant_type": "refresh_token", "client_id": client_id, "refresh_token": self.refresh_token(entry),
            "resource": "https://api.openai.com/v1"})
        return self.read(self.accept(reply), vendor.clock(), entry)


class CopilotSubscription(Subscription):
    """GitHub Copilot: the log-in is GitHub's and stays; a short-lived token for Copilot is fetched with it."""

    def renew(self, entry: Mapping[str, Any], vendor: Vendor) -> Dict[str, Any]:
        """See `Subscription.renew`."""
        domain = host_of(entry.get("enterpriseUrl") or "") or "github.com"
        headers = {**COPILOT_HEADERS, "authorization": f"Bearer {self.refresh_token(entry)}"}
        reply = vendor.get(f"https://api.{domain}/copilot_internal/v2/token", headers)
        if reply.status == 404:
            raise self.over("this account has no Copilot")
        fields = self.accept(reply)
        token, expires_at = fields.get("token"), number_of(fields.get("expires_at"))
        if not isinstance(token, str) or not token or not expires_at:
            raise UpstreamProtocolError(f"{self.title}: the log-in server answered without a token")
        now = vendor.clock()
        return {"type": "oauth", "access": token, "refresh": entry["refresh"],
                "expires": self.expiry(max(1.0, expires_at - now), now)}

    def complete(self, entry: Dict[str, Any], vendor: Vendor) -> Dict[str, Any]:
        """The Copilot token, and the models of the plan: those not yet switched on are."""
        entry = {**entry, **self.renew(entry, vendor)}
        base_url = copilot_base_url(entry["access"], host_of(entry.get("enterpriseUrl") or ""))
        headers = {**COPILOT_HEADERS, "authorization": f"Bearer {entry['access']}"}
        try:
            reply = vendor.get(f"{base_url}/models", {**headers, "x-github-api-version": COPILOT_API_VERSION}, 5.0)
            available = self._enable(reply, base_url, headers, vendor)
        except (GatewayError, TypeError):       # a log-in is good without the list, and an empty one hides all from pi
            available = []
        return {**entry, **({"availableModelIds": available} if available else {})}

    def _enable(self, reply: VendorReply, base_url: str, headers: Mapping[str, str], vendor: Vendor) -> List[str]:
        """The ids of the models that may be called, after switching on those that only wait for that."""
        items = [as_dict(item) for item in reply.fields.get("data") or () if isinstance(as_dict(item).get("id"), str)]
        states = {item["id"]: as_dict(item.get("policy")).get("state") for item in items}
        capable = [item["id"] for item in items if states[item["id"]] != "disabled"
                   and as_dict(as_dict(item.get("capabilities")).get("supports")).get("tool_calls")]
        picked = {item["id"] for item in items if item.get("model_picker_enabled")}
        ready = [name for name in capable if name in picked] or [name for name in capable if states[name] == "enabled"]
        headers = {**headers, "openai-intent": "chat-policy", "x-interaction-type": "chat-policy"}
        for name in capable:
            if states[name] != "unconfigured" or (picked and name not in picked):
                continue
            path = urllib.parse.quote(name, safe="")
            try:
                answer = vendor.post(f"{base_url}/models/{path}/policy", {"state": "enabled"}, headers, True, 5.0)
            except UpstreamError:
                continue
            if answer.status == 429:
                break
            if answer.ok and name not in ready:
                ready.append(name)
        return ready


def host_of(text: str) -> str:
    """The host name in a URL or a bare name, "" when there is none."""
    try:
        host = urllib.parse.urlsplit(text if "//" in text else "//" + text).hostname or ""
    except ValueError:
        return ""
    return host if re.fullmatch(r"[a-z0-9](?:[a-z0-9.-]*[a-z0-9])?", host) else ""


CODE_ASSIST = "https://cloudcode-pa.googleapis.com"
CODE_ASSIST_METADATA = {"ideType": "IDE_UNSPECIFIED", "platform": "PLATFORM_UNSPECIFIED", "pluginType": "GEMINI"}
CODE_ASSIST_HEADERS = {"user-agent": "google-api-nodejs-client/9.15.1", "x-goog-api-client": "gl-node/22.17.0"}
ONBOARD_TRIES, ONBOARD_PAUSE_S = 24, 5.0


class GeminiSubscription(Subscription):
    """Gemini CLI: calls are made for a Google Cloud project, which free accounts are given when they begin."""

    def complete(self, entry: Dict[str, Any], vendor: Vendor) -> Dict[str, Any]:
        """E-mail address and project."""
        headers = {"authorization": f"Bearer {entry['access']}"}
        entry = {**entry, "projectId": self.project(headers, vendor)}
        try:
            reply = vendor.get("https://www.googleapis.com/oauth2/v1/userinfo?alt=json", headers)
            email = reply.fields.get("email")
            return {**entry, **({"email": email} if isinstance(email, str) else {})}
        except UpstreamError:
            return entry

    def project(self, headers: Mapping[str, str], vendor: Vendor) -> str:
        """The project, found or made. Raises `LogInFailed`, `UpstreamError`."""
        headers = {**headers, **CODE_ASSIST_HEADERS}
        own = os.environ.get("GOOGLE_CLOUD_PROJECT") or os.environ.get("GOOGLE_CLOUD_PROJECT_ID")
        metadata = present(**CODE_ASSIST_METADATA, duetProject=own)
        reply = vendor.post(f"{CODE_ASSIST}/v1internal:loadCodeAssist",
                            present(cloudaicompanionProject=own, metadata=metadata), headers, True)
        if not reply.ok and "SECURITY_POLICY_VIOLATED" not in dumps(reply.fields):
            self.accept(reply)
        tiers = [as_dict(tier) for tier in reply.fields.get("allowedTiers") or ()]
        found = project_id(reply.fields)
        if reply.fields.get("currentTier") or not reply.ok:
            return self._known(found or own)
        tier = next((tier.get("id") for tier in tiers if tier.get("isDefault")), None) or "legacy-tier"
        if tier != "free-tier" and not own:
            return self._known(None)
        extra = {} if tier == "free-tier" else {"cloudaicompanionProject": own}
        metadata = dict(CODE_ASSIST_METADATA) if tier == "free-tier" else metadata
        body = {"tierId": tier, "metadata": metadata, **extra}
        operation = self.accept(vendor.post(f"{CODE_ASSIST}/v1internal:onboardUser", body, headers, True))
        for number in range(ONBOARD_TRIES):
            if operation.get("done"):
                break
            if number:
                vendor.pause(ONBOARD_PAUSE_S)
            operation = self.accept(vendor.get(f"{CODE_ASSIST}/v1internal/{operation.get('name')}", headers))
        return self._known(project_id(as_dict(operation.get("response"))) or own)

    def _known(self, project: Optional[str]) -> str:
        if not project:
            raise LogInFailed("this Google account needs a project of its own: set GOOGLE_CLOUD_PROJECT and log in again")
        return project


class AntigravitySubscription(GeminiSubscription):
    """Antigravity: as Gemini CLI, with a project for those who have none."""

    def project(self, headers: Mapping[str, str], vendor: Vendor) -> str:
        """See `GeminiSubscription.project`; never fails."""
        metadata = dict(CODE_ASSIST_METADATA)
        headers = {**headers, **CODE_ASSIST_HEADERS, "x-goog-api-client": "google-cloud-sdk vscode_cloudshelleditor/0.1",
                   "client-metadata": dumps(metadata)}
        for base in (CODE_ASSIST, "https://daily-cloudcode-pa.sandbox.googleapis.com"):
            try:
                reply = vendor.post(f"{base}/v1internal:loadCodeAssist", {"metadata": metadata}, headers, True)
            except UpstreamError:
                continue
            found = project_id(reply.fields)
            if reply.ok and found:
                return found
        return "rising-fact-p41fc"


def project_id(fields: Mapping[str, Any]) -> Optional[str]:
    """The Code Assist project that an answer names, as a string or inside an object."""
    value = fields.get("cloudaicompanionProject")
    value = as_dict(value).get("id") if isinstance(value, dict) else value
    return value if isinstance(value, str) and value else None


class MetaSubscription(Subscription):
    """Meta: the log-in only says who somebody is; a key for a day is made with it."""

    KEY_LIFE_S = 86_400

    def read(self, fields: Mapping[str, Any], now: float, old: Mapping[str, Any] = MappingProxyType({})) -> Dict[str, Any]:
        """The identity token stands where others have their refresh token."""
        return super().read({**fields, "refresh_token": fields.get("access_token")}, now, old)

    def complete(self, entry: Dict[str, Any], vendor: Vendor) -> Dict[str, Any]:
        """The first key."""
        return {**entry, **self.renew(entry, vendor)}

    def renew(self, entry: Mapping[str, Any], vendor: Vendor) -> Dict[str, Any]:
        """See `Subscription.renew`."""
        headers = {"authorization": f"Bearer {self.refresh_token(entry)}", "x-api-version": "1.0.0"}
        fields = self.accept(vendor.post("https://api.meta.ai/muse-code/key", {}, headers, True))
        key, where = fields.get("api_key"), fields.get("action_url")
        if not isinstance(key, str) or not key:
            is_page = isinstance(where, str) and where.startswith("https://")
            raise self.over(f"Meta asks you to visit {printable(where)[:200]}" if is_page else "Meta gave no key")
        return {"type": "oauth", "access": key, "refresh": entry["refresh"],
                "expires": int((vendor.clock() + self.KEY_LIFE_S) * 1000)}


class OpenRouterSubscription(Subscription):
    """OpenRouter: the log-in ends in a key that stays valid until it is revoked there."""

    def exchange(self, vendor: Vendor, code: str, verifier: str, redirect: str, state: str) -> Dict[str, Any]:
        """See `Subscription.exchange`."""
        fields = self.accept(vendor.post(
            self.token_url, {"code": code, "code_verifier": verifier, "code_challenge_method": "S256"}, as_json=True))
        key = fields.get("key")
        if not isinstance(key, str) or not key:
            raise UpstreamProtocolError(f"{self.title}: the log-in server answered without a key")
        return {"type": "oauth", "access": key, "refresh": "", "expires": NEVER_MS}


_GOOGLE_AUTHORIZE, _GOOGLE_TOKENS = "https://accounts.google.com/o/oauth2/v2/auth", "https://oauth2.googleapis.com/token"
_GOOGLE_SCOPES = " ".join("https://www.googleapis.com/auth/" + name for name in (
    "cloud-platform", "userinfo.email", "userinfo.profile"))
_GOOGLE_TERMS = "Google's terms do not allow other programs to use the log-in of {}; accounts have been blocked for it."

SUBSCRIPTIONS: Dict[str, Subscription] = {row.provider: row for row in (
    Subscription(
        "anthropic", "Claude Pro/Max", "9d1c250a-e61b-44d9-88ed-5944d1962f5e",
        "https://platform.claude.com/v1/oauth/token", "https://claude.ai/oauth/authorize",
        "http://localhost:53692/callback", "org:create_api_key user:profile user:inference user:sessions:claude_code "
        "user:mcp_servers user:file_upload", {"code": "true"}, as_json=True,
        terms="Anthropic's terms allow a Claude subscription in Claude Code and claude.ai only; other use can end it.",
        accepted=f"Claude Code's own log-in, passed through untouched ({NAME}.py --pass-through anthropic)"),
    CodexSubscription(
        "openai-codex", "ChatGPT Plus/Pro (Codex)", "app_EMoamEEZ73f0CkXaXp7hrann", "https://auth.openai.com/oauth/token",
        "https://auth.openai.com/oauth/authorize", CODEX_REDIRECT, "openid profile email offline_access",
        {"id_token_add_organizations": "true", "codex_cli_simplified_flow": "true", "originator": NAME}, margin_s=0,
        device_url="https://auth.openai.com/api/accounts/deviceauth", account_fields=("accountId",), is_personal=True,
        terms="OpenAI gives a ChatGPT plan for ChatGPT and Codex; it has not said that other programs may use it."),
    CopilotSubscription(
        "github-copilot", "GitHub Copilot", "Iv1.b507a08c87ecfe98", "https://{domain}/login/oauth/access_token",
        device_url="https://{domain}/login/device/code", device_fields={"scope": "read:user"},
        account_fields=("refresh",), is_personal=True,
        terms="GitHub gives Copilot for the editors and tools that it supports; other use can end it."),
    GeminiSubscription(
        "google-gemini-cli", "Gemini CLI",
        "681255809395-oo8ft2oprdrnp9e3aqf6av3hmdib135j.apps.googleusercontent.com", _GOOGLE_TOKENS, _GOOGLE_AUTHORIZE,
        "http://localhost:8085/oauth2callback", _GOOGLE_SCOPES, {"access_type": "offline", "prompt": "consent"},
        "R09DU1BYLTR1SGdNUG0tMW83U2stZ2VWNkN1NWNsWEZzeGw=", account_fields=("projectId",), is_personal=True,
        terms=_GOOGLE_TERMS.format("Gemini CLI")),
    AntigravitySubscription(
        "google-antigravity", "Google Antigravity",
        "1071006060591-tmhssin2h21lcre235vtolojh4g403ep.apps.googleusercontent.com", _GOOGLE_TOKENS, _GOOGLE_AUTHORIZE,
        "http://localhost:51121/oauth-callback", _GOOGLE_SCOPES + " https://www.googleapis.com/auth/cclog "
        "https://www.googleapis.com/auth/experimentsandconfigs", {"access_type": "offline", "prompt": "consent"},
        "R09DU1BYLUs1OEZXUjQ4NkxkTEoxbUxCOHNYQzR6NnFEQWY=", account_fields=("projectId",), is_personal=True,
        terms=_GOOGLE_TERMS.format("Antigravity")),
    Subscription(
        "xai", "xAI (Grok)", "b1a00492-073a-47ea-816f-4c329264a828", "https://auth.x.ai/oauth2/token",
        device_url="https://auth.x.ai/oauth2/device/code", device_fields={
            "scope": "openid profile email offline_access grok-cli:access api:access", "referrer": NAME}),
    Subscription(
        "kimi-coding", "Kimi Code", "17e5f671-d194-4dfb-9706-5516cb48c098", "https://auth.kimi.com/api/oauth/token",
        device_url="https://auth.kimi.com/api/oauth/device_authorization", margin_s=0),
    MetaSubscription(
        "meta", "Meta (Muse)", "1031625952748946", "https://auth.meta.com/oidc/device/token/",
        device_url="https://auth.meta.com/oidc/device/authorization/", account_fields=("refresh",)),
    OpenRouterSubscription(
        "openrouter", "OpenRouter", token_url="https://openrouter.ai/api/v1/auth/keys",
        authorize_url="https://openrouter.ai/auth", account_fields=("access",)),
    OpenAISubscription(
        "openai", "Sign in with ChatGPT", token_url="https://auth.openai.com/api/accounts/oauth/token", margin_s=180,
        account_fields=("clientId",)),
)}


def entry_secrets(entry: Mapping[str, Any]) -> List[str]:
    """What of an entry may not be shown."""
    return [value for value in (entry.get(name) for name in ("access", "refresh", *NAMING_FIELDS))
            if isinstance(value, str) and len(value) >= 4]


class Renewal:
    """One renewal, under way or over, shared by all who wait for it."""

    def __init__(self, access: str) -> None:
        self.access = access                    # the token that it is to replace
        self.done = threading.Event()
        self.is_spending = False                # the refresh token is on its way and must not be lost
        self.entry: Dict[str, Any] = {}
        self.error: Optional[GatewayError] = None
        self.retry_at = 0.0

    def result(self) -> Dict[str, Any]:
        """The renewed entry. Raises what went wrong."""
        self.done.wait()
        if self.error:
            raise self.error.again()
        return self.entry


class Logins:
    """The log-ins in auth.json, their tokens renewed in time: once, however many threads and processes want them."""

    def __init__(self, file: AuthFile, vendor: Vendor) -> None:
        self._file = file
        self._failures_path = os.path.join(os.path.dirname(os.path.abspath(file.path)), FAILURES_FILE)
        self._vendor = vendor
        self._lock = threading.Lock()
        self._renewals: Dict[str, Renewal] = {}
        self._seen: Dict[str, Tuple[str, float]] = {}
        self._forced: Dict[str, float] = {}
        self._unsaved: Dict[str, Tuple[Any, Dict[str, Any]]] = {}
        self._closing = threading.Event()

    def entry(self, name: str) -> Dict[str, Any]:
        """A provider's entry as it stands, {} when there is none."""
        return self._with_unsaved(name, self._file.entry(name))

    def current(self, name: str) -> Dict[str, Any]:
        """A log-in's entry with a token that is good now. One that ends soon is renewed beside the request, one that
        has ended before it. Raises `LogInOver`, `UpstreamError`."""
        entry = self.entry(name)
        left_s = self._left(entry)
        if left_s > self._lead(name, entry):
            return entry
        if name not in SUBSCRIPTIONS:
            if left_s > 0:
                return entry
            raise LogInOver(f'the log-in for "{name}" has expired; log in again where it was made')
        renewal = self._renewal(name, entry)
        return entry if left_s > 0 or renewal is None else renewal.result()

    def replace_refused(self, name: str, access: str) -> bool:
        """Whether there is another token than `access`, which the provider has refused: renewed by somebody else, or
        now. Raises `LogInOver`, `UpstreamError`."""
        entry = self.entry(name)
        if entry.get("type") != "oauth" or name not in SUBSCRIPTIONS:
            return False
        if entry.get("access") == access:
            renewal = self._renewal(name, entry, True)
            entry = renewal.result() if renewal else entry
        return entry.get("access") != access

    def close(self) -> None:
        """Lets a renewal that has begun come to its end, so that its refresh token is kept."""
        self._closing.set()
        for renewal in list(self._renewals.values()):
            if renewal.is_spending:
                renewal.done.wait(VENDOR_LIMIT_S + VENDOR_CONNECT_S)
        for name in list(self._unsaved):
            self._save(name)

    def _left(self, entry: Mapping[str, Any]) -> float:
        """Seconds that the entry's token still has."""
        return expiry_of(entry) - self._vendor.clock()

    def _lead(self, name: str, entry: Mapping[str, Any]) -> float:
        """How many seconds before its end the token is renewed."""
        access, now = str(entry.get("access")), self._vendor.clock()
        if self._seen.get(name, ("", 0.0))[0] != access:
            self._seen[name] = (access, now)
        return min(REFRESH_EARLY_S, max(0.0, self._left(entry) + now - self._seen[name][1]) / 10)

    def _renewal(self, name: str, entry: Mapping[str, Any], is_refused: bool = False) -> Optional[Renewal]:
        """The renewal of this very token: the one under way, the one that has just failed, or a new one; None when the
        last one because of a refusal is not long ago."""
        access, now = str(entry.get("access")), time.monotonic()
        with self._lock:
            renewal = self._renewals.get(name)
            if renewal and renewal.access == access and (
                    not renewal.done.is_set() or (renewal.error and now < renewal.retry_at)):
                return renewal
            if is_refused:
                if now - self._forced.get(name, -REFRESH_FORCED_S) < REFRESH_FORCED_S:
                    return None
                self._forced[name] = now
            renewal = self._renewals[name] = Renewal(access)
        try:
            threading.Thread(target=self._run, args=(name, renewal), name=f"renew {name}", daemon=True).start()
        except RuntimeError:                    # no more threads
            self._run(name, renewal)
        return renewal

    def _run(self, name: str, renewal: Renewal) -> None:
        wait_s = REFRESH_FAILED_S
        secret = entry_secrets(self.entry(name))
        try:
            renewal.entry = self._renew(name, renewal)
        except LogInOver as error:
            renewal.error, wait_s = error, REFRESH_OVER_S
        except GatewayError as error:
            renewal.error, wait_s = error, min(max(5.0, error.retry_after or wait_s), REFRESH_OVER_S)
        except AuthFileError as error:
            renewal.error = GatewayError(f'the log-in for "{name}" cannot be renewed: {error}', code="auth_file_unusable")
        except Exception as error:              # the edge of the thread: those who wait must hear something
            log.debug("where it happened", exc_info=True)
            renewal.error = GatewayError(f'the log-in for "{name}" cannot be renewed ({type(error).__name__})')
        if renewal.error:
            renewal.error.hide([*secret, *entry_secrets(self.entry(name))])
            renewal.retry_at = time.monotonic() + wait_s
            log.warning("%s", renewal.error.message)
        renewal.is_spending = False
        renewal.done.set()

    def _renew(self, name: str, renewal: Renewal) -> Dict[str, Any]:
        row = SUBSCRIPTIONS[name]
        with self._file.lock.held():
            entry = self._with_unsaved(name, as_dict(self._file.load().get(name)))
            if entry.get("type") != "oauth":
                raise LogInOver(f'there is no log-in for "{name}" any more; {log_in_advice(name)}')
            if entry.get("access") != renewal.access and self._left(entry) > 0:
                return entry                    # another process was first
            self._file.lock.ensure()
            self._file.check_writable()
            renewal.is_spending = True          # said before one looks: whatever `close` does not see has not begun
            if self._closing.is_set():
                raise ShuttingDown("the gateway is stopping")
            self._check_failures(name, renewal.access)
            began = time.monotonic()
            try:
                fields = row.renew(entry, self._vendor)
            except UpstreamError as error:
                if time.monotonic() - began > HANGING_S:
                    self._note_failure(name, renewal.access, error)
                raise
            except LogInOver:
                # A tool that takes no lock may have renewed it in these moments.
                newer = as_dict(self._file.load().get(name))
                if newer.get("type") != "oauth" or newer.get("refresh") == entry.get("refresh"):
                    raise
                if newer.get("access") != renewal.access and self._left(newer) > 0:
                    return newer
                entry, fields = newer, row.renew(newer, self._vendor)
            self._unsaved[name] = (entry.get("refresh"), fields)
            if not self._save(name):
                threading.Thread(target=self._save_later, args=(name,), daemon=True).start()
        return {**entry, **fields}

    def _check_failures(self, name: str, access: str) -> None:
        """Raises the failure that another process has met with this token a moment ago: while each waits for a vendor
        that hangs, it holds the lock that all log-ins need."""
        known = as_dict(self._failures().get(name))
        age_s, message = self._vendor.clock() - number_of(known.get("at")), known.get("message")
        if known.get("token") == _digest(access) and 0 <= age_s < HANGING_WAIT_S and isinstance(message, str):
            raise UpstreamError(message, retry_after=HANGING_WAIT_S - age_s)

    def _failures(self) -> Dict[str, Any]:
        try:
            with open(self._failures_path, encoding="utf-8") as file:
                return as_dict(json.load(file))
        except (OSError, ValueError, RecursionError):
            return {}

    def _note_failure(self, name: str, access: str, error: UpstreamError) -> None:
        error.hide(entry_secrets(self.entry(name)))
        failure = {"token": _digest(access), "at": self._vendor.clock(), "message": error.message}
        known = {**self._failures(), name: failure}
        with contextlib.suppress(OSError):
            write_private_file(self._failures_path, dumps(known).encode("ascii"))

    def _with_unsaved(self, name: str, entry: Dict[str, Any]) -> Dict[str, Any]:
        spent, fields = self._unsaved.get(name, ("", {}))
        return {**entry, **fields} if fields and entry.get("refresh") == spent else entry

    def _save(self, name: str) -> bool:
        """Writes a renewed entry, unless the log-in was ended or made anew meanwhile."""
        spent, fields = self._unsaved.get(name, ("", {}))

        def merge(entry: Dict[str, Any]) -> Optional[Dict[str, Any]]:
            is_ours = entry.get("type") == "oauth" and entry.get("refresh") == spent
            return {**entry, **fields} if is_ours else entry or None

        try:
            self._file.change(name, merge)
            if self._unsaved.get(name) == (spent, fields):      # not a newer one
                del self._unsaved[name]
            return True
        except AuthFileError as error:
            log.error('the renewed log-in for "%s" is in memory only: %s', name, error)
            return False

    def _save_later(self, name: str) -> None:
        while not self._closing.wait(SAVE_AGAIN_S):
            if self._save(name):
                return


# --- Finding the credential for a call ---------------------------------------------------------------------------------


class Credentials:
    """Finds what authorises a call: auth.json first, then models.json's `apiKey`, then the environment (the order of pi
    0.77 and later). Values may be literal, `$NAME` or `!command`, and for older files the bare name of a variable."""

    def __init__(self, auth_file: str, environ: Mapping[str, str], clock: Callable[[], float] = time.time,
                 transport: Optional[Transport] = None, vendor_transport: Optional[Transport] = None) -> None:
        self._environ = environ
        self._clock = clock
        self._auth = AuthFile(auth_file)
        self._vendor = Vendor(vendor_transport or transport, clock)
        self.logins = Logins(self._auth, self._vendor)
        self._other_logins: Dict[str, Logins] = {}
        direct = Transport(Limits(1.0, 2.0, 2.0), proxies={})      # for this machine's metadata services only
        self._google_tokens = GoogleTokens(transport, clock)
        self._aws_credentials = AwsCredentials(transport or direct, direct, clock)
        self._lock = threading.Lock()
        self._commands: Dict[str, Tuple[float, Optional[str]]] = {}
        self._warned: set[str] = set()

    def log_in_of(self, provider: Provider) -> Tuple[Logins, str]:
        """Where the provider's log-in is kept: the file, and the name of its entry."""
        name = provider.log_in or provider.name
        if not provider.auth_file:
            return self.logins, name
        with self._lock:
            if provider.auth_file not in self._other_logins:
                self._other_logins[provider.auth_file] = Logins(AuthFile(provider.auth_file), self._vendor)
            return self._other_logins[provider.auth_file], name

    def entry_of(self, provider: Provider) -> Dict[str, Any]:
        """The provider's entry in auth.json as it stands, {} when there is none."""
        logins, name = self.log_in_of(provider)
        return logins.entry(name)

    def close(self) -> None:
        """Waits for tokens on their way."""
        for logins in [self.logins, *self._other_logins.values()]:
            logins.close()

    def usable(self, provider: Provider) -> bool:
        """Whether there is something to try for this provider; runs no command and asks nobody."""
        entry = self.entry_of(provider)
        has_key = bool(provider.keyless or entry.get("key") or entry.get("access") or provider.api_key
                       or any(self._environ.get(name) for name in provider.env))
        if provider.source in self.ambient and (not has_key or provider.source == "azure"):
            has_key = self.ambient[provider.source](self, entry, has_key)
        return has_key and all(self._variable(name, entry) for url in provider.endpoints.values()
                               for name in _PLACEHOLDER.findall(url))

    def is_subscription(self, provider: Provider) -> bool:
        """Whether calls to this provider are paid by somebody's personal plan, as far as that shows without running a
        command; a call's own credential has the last word."""
        entry = self.entry_of(provider)
        row = SUBSCRIPTIONS.get(provider.log_in or provider.name)
        if entry.get("type") == "oauth" or (row and row.is_personal):
            return True
        values = [entry.get("key"), provider.api_key, *(self._variable(name, entry) for name in provider.env)]
        keys = [self.resolve(value, entry) for value in values if isinstance(value, str) and not value.startswith("!")]
        return any(OAUTH_MARK in key for key in keys if key)

    def get(self, provider: Provider, model: Model) -> Credential:
        """The credential for a call. Raises `Unauthorized`, code no_credentials, that says what to set."""
        entry = self.entry_of(provider)
        if entry.get("type") == "oauth":
            logins, name = self.log_in_of(provider)
            entry = logins.current(name)
        credential = self.sources.get(provider.source, Credentials._key)(self, provider, entry)
        headers = self.headers(provider, model)
        if provider.auth_header and credential.token:
            headers["authorization"] = f"Bearer {credential.token}"
        named = {name: entry[name] for name in NAMING_FIELDS if isinstance(entry.get(name), str)}
        return replace(credential, headers=headers, account=self._account(provider, entry, credential),
                       parts={**named, **credential.parts})

    def headers(self, provider: Provider, model: Model) -> Dict[str, str]:
        """The configured headers for a call. Raises `Unauthorized` for one that resolves to nothing."""
        entry = self.entry_of(provider)
        return {name: self._header(provider, name, value, entry)
                for name, value in {**provider.headers, **model.headers}.items()}

    def _account(self, provider: Provider, entry: Mapping[str, Any], credential: Credential) -> str:
        """What tells this account from another at the same provider, as a hash: what a log-in keeps while its tokens
        change, or the key. "" when that is not known."""
        if entry.get("type") == "oauth":
            row = SUBSCRIPTIONS.get(provider.log_in or provider.name)
            known = [str(entry.get(name) or "") for name in (row.account_fields if row else ())]
        else:
            known = [credential.token] if credential.kind == "api_key" else []
        return _digest("\n".join([provider.name, *known]))[:8] if any(known) else ""

    def _key(self, provider: Provider, entry: Mapping[str, Any]) -> Credential:
        """A key or token as it stands."""
        token, kind = self._token(provider, entry)
        if not token and (not provider.keyless or provider.api_key or entry.get("key")):
            raise Unauthorized(self._advice(provider, entry), code="no_credentials", param="model")
        return Credential(kind if token else "none", token or "")

    def _aws(self, provider: Provider, entry: Mapping[str, Any]) -> Credential:
        stored = entry.get("key")
        key = self.resolve(stored, entry) if isinstance(stored, str) else None
        if not stored and provider.api_key:
            key = self.resolve(provider.api_key, entry)
        return self._aws_credentials.get(self._environ, as_dict(entry.get("env")), key)

    def _google(self, provider: Provider, entry: Mapping[str, Any]) -> Credential:
        token, _ = self._token(provider, entry)
        if not token:
            return self._google_tokens.token(self._environ, as_dict(entry.get("env")))
        parts = {"project": self._variable("GOOGLE_CLOUD_PROJECT", entry) or self._variable("GCLOUD_PROJECT", entry),
                 "location": self._variable("GOOGLE_CLOUD_LOCATION", entry)}
        return Credential("api_key", token, parts=present(**parts) if all(parts.values()) else {})

    def _azure(self, provider: Provider, entry: Mapping[str, Any]) -> Credential:
        parts = {name: self._variable(variable, entry) for name, variable in AZURE_VARIABLES.items()}
        credential = self._key(provider, entry)
        endpoint = azure_base_url(present(**parts), provider.endpoints[provider.protocol])
        return replace(credential, parts=present(**parts, endpoint=endpoint))

    def _code_assist(self, provider: Provider, entry: Mapping[str, Any]) -> Credential:
        project = entry.get("projectId") or self._variable("GOOGLE_CLOUD_PROJECT", entry)
        return replace(self._key(provider, entry), parts=present(project=project))

    def _copilot(self, provider: Provider, entry: Mapping[str, Any]) -> Credential:
        credential = self._key(provider, entry)
        domain = entry.get("enterpriseUrl")
        endpoint = copilot_base_url(credential.token, domain if isinstance(domain, str) else "")
        return replace(credential, parts={"endpoint": endpoint})

    sources: Mapping[str, Callable[[Any, Provider, Mapping[str, Any]], Credential]] = {
        "aws": _aws, "google": _google, "azure": _azure, "code-assist": _code_assist, "copilot": _copilot}

    def _has_aws(self, entry: Mapping[str, Any], has_key: bool) -> bool:
        settings = {**self._environ, **as_dict(entry.get("env"))}
        return AwsCredentials.is_ambient(settings) or entry.get("type") == "api_key"

    def _has_google(self, entry: Mapping[str, Any], has_key: bool) -> bool:
        settings = {**self._environ, **as_dict(entry.get("env"))}
        has_project = settings.get("GOOGLE_CLOUD_PROJECT") or settings.get("GCLOUD_PROJECT")
        return bool(has_project and self._google_tokens.usable(settings))

    def _has_azure(self, entry: Mapping[str, Any], has_key: bool) -> bool:
        return has_key and any(self._variable(AZURE_VARIABLES[name], entry) for name in ("base_url", "resource"))

    ambient: Mapping[str, Callable[[Any, Mapping[str, Any], bool], bool]] = {
        "aws": _has_aws, "google": _has_google, "azure": _has_azure}

    def fill(self, url: str, provider: Provider) -> str:
        """A base URL with its {NAME} placeholders filled in. Raises `Unauthorized` that names what is missing."""
        entry = self.entry_of(provider)
        for name in _PLACEHOLDER.findall(url):
            value = self._variable(name, entry)
            if not value:
                raise Unauthorized(f'"{provider.name}" needs {name} as well', code="no_credentials", param="model")
            url = url.replace("{%s}" % name, value)
        return url

    def _variable(self, name: str, entry: Mapping[str, Any]) -> Optional[str]:
        own = as_dict(entry.get("env")).get(name)
        return own if isinstance(own, str) and own else self._environ.get(name) or None

    def _token(self, provider: Provider, entry: Mapping[str, Any]) -> Tuple[Optional[str], str]:
        if entry.get("type") == "oauth":
            access = entry.get("access")
            return (access if isinstance(access, str) else None), "oauth"
        key = entry.get("key")
        token = self.resolve(key, entry) if isinstance(key, str) else None
        token = token or (self.resolve(provider.api_key, entry) if provider.api_key and not key else None)
        token = token or next((value for value in (self._variable(name, entry) for name in provider.env) if value), None)
        if token == SENTINEL:
            return None, "none"
        return token, "oauth" if token and OAUTH_MARK in token else "api_key"

    def _advice(self, provider: Provider, entry: Mapping[str, Any]) -> str:
        if entry.get("key") or provider.api_key:
            return f'the key for "{provider.name}" in the configuration resolves to nothing; check its variable or command'
        if not provider.env:
            return f'no log-in for "{provider.name}"; {log_in_advice(provider.name)}'
        return f'no key for "{provider.name}": set {provider.env[-1]}'

    def _header(self, provider: Provider, name: str, value: str, entry: Mapping[str, Any]) -> str:
        resolved = self.resolve(value, entry)
        if not resolved:
            raise Unauthorized(f'the header {name} for "{provider.name}" resolves to nothing; check its variable or '
                               "command", code="no_credentials", param="model")
        return resolved

    def resolve(self, value: str, entry: Mapping[str, Any] = MappingProxyType({})) -> Optional[str]:
        """The secret that a configured value stands for, None when that is nothing."""
        if value.startswith("!"):
            return self._run(value[1:])
        if _INTERPOLATION.search(value):
            return self._interpolate(value, entry)
        if re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", value):
            from_environment = self._variable(value, entry)
            if from_environment:                # how pi before 0.77 named a variable
                return from_environment
            if value.isupper() and "_" in value and value not in self._warned:
                self._warned.add(value)
                log.warning("a key is written %s, like the name of a variable that is not set; it is used as it stands "
                            "(write $%s for a variable)", value, value)
        return value.strip() or None

    def _interpolate(self, value: str, entry: Mapping[str, Any]) -> Optional[str]:
        missing = []

        def fill(match: re.Match[str]) -> str:
            if match.group(1) or match.group(2):
                return match.group(1) or match.group(2)
            name = match.group(3) or match.group(4)
            found = self._variable(name, entry)
            missing.extend([] if found else [name])
            return found or ""

        text = _INTERPOLATION.sub(fill, value)
        return None if missing else text.strip() or None

    def _run(self, command: str) -> Optional[str]:
        """The output of a command; kept a while, since it may ask a password manager. One thread at a time: the others
        wait for its result."""
        with self._lock:
            expires, value = self._commands.get(command, (0.0, None))
            if self._clock() < expires:
                return value
            try:
                done = subprocess.run(command, shell=True, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
                                      stderr=subprocess.DEVNULL, timeout=COMMAND_TIMEOUT_S, check=False)
                value = done.stdout.decode("utf-8", "replace").strip() if done.returncode == 0 else None
            except (OSError, subprocess.SubprocessError):
                value = None
            keep = COMMAND_CACHE_S if value else COMMAND_TIMEOUT_S
            self._commands[command] = (self._clock() + keep, value or None)
            return value or None


# --- Google Cloud -----------------------------------------------------------------------------------------------------
#
# Application Default Credentials: where a token for Google Cloud comes from when no key is set.

GOOGLE_TOKEN_URL = "https://oauth2.googleapis.com/token"
GOOGLE_SCOPE = "https://www.googleapis.com/auth/cloud-platform"
GOOGLE_EARLY_S = 225.0              # google-auth renews a token 3:45 before it ends
GOOGLE_LIFETIME_S = 3600            # the longest that a signed assertion may be valid
GOOGLE_FAILURE_S = 15.0             # for so long a failure is told again without asking again
GOOGLE_TRIES, GOOGLE_PAUSE_S = 3, 0.5
GOOGLE_RETRIED = frozenset({408, 429, 500, 502, 503, 504})
GOOGLE_PASSING = ("internal_failure", "server_error", "temporarily_unavailable")
GOOGLE_LOGIN = 'run "gcloud auth application-default login"'
METADATA_HOST = "169.254.169.254"   # link-local, so that no DNS server is asked on machines that have none
METADATA_TIMEOUT_S = 3.0
METADATA_HEADERS = {"Metadata-Flavor": "Google"}
METADATA_ROOT = "/computeMetadata/v1"
# DigestInfo of SHA-256 up to the digest itself (RFC 8017 §9.2, note 1)
_SHA256_PREFIX = bytes.fromhex("3031300d060960864801650304020105000420")
_DER_INTEGER, _DER_OCTETS, _DER_SEQUENCE = 0x02, 0x04, 0x30


class RsaKey(NamedTuple):
    """The numbers of an RSA private key, in the order of PKCS#1 (RFC 8017 §A.1.2)."""

    n: int
    e: int
    d: int
    p: int
    q: int
    dp: int
    dq: int
    qinv: int


def read_der(data: bytes) -> List[Tuple[int, bytes]]:
    """The (tag, content) pairs that follow each other in `data`. Raises ValueError when one is cut."""
    items, place = [], 0
    while place < len(data):
        if place + 2 > len(data):
            raise ValueError("cut DER value")
        tag, length, place = data[place], data[place + 1], place + 2
        if length & 0x80:
            width = length & 0x7f
            length, place = int.from_bytes(data[place:place + width], "big"), place + width
        if place + length > len(data):
            raise ValueError("cut DER value")
        items.append((tag, data[place:place + length]))
        place += length
    return items


def parse_pem(text: str) -> RsaKey:
    """The RSA key in a PEM text, PKCS#8 or PKCS#1; its label is not believed. Raises ValueError."""
    if "ENCRYPTED" in text:
        raise ValueError("the private key is encrypted")
    lines = [line.strip() for line in text.replace("\\n", "\n").splitlines()]
    try:
        data = base64.b64decode("".join(line for line in lines if not line.startswith("-----")), validate=True)
        fields = read_der(read_der(data)[0][1])
        if fields[1][0] == _DER_SEQUENCE:       # PKCS#8: version, algorithm, the key as an octet string
            fields = read_der(read_der(fields[2][1])[0][1])
        numbers = [int.from_bytes(content, "big") for tag, content in fields[1:9] if tag == _DER_INTEGER]
        return RsaKey(*numbers)
    except (ValueError, IndexError, TypeError):
        raise ValueError("the private key is not an RSA key in PEM form") from None


def sign_rs256(key: RsaKey, message: bytes) -> bytes:
    """The RSASSA-PKCS1-v1_5 signature with SHA-256 (RFC 8017 §8.2.1), by the Chinese remainder theorem. Raises
    ValueError when it does not verify: the key is damaged. Not in constant time, which is fine for signing one's own
    assertions, and not for what strangers send."""
    size = (key.n.bit_length() + 7) // 8
    digest = _SHA256_PREFIX + hashlib.sha256(message).digest()
    if size < len(digest) + 11:
        raise ValueError("the RSA key is too short")
    padded = b"\x00\x01" + b"\xff" * (size - 3 - len(digest)) + b"\x00" + digest
    number = int.from_bytes(padded, "big")
    first, second = pow(number % key.p, key.dp, key.p), pow(number % key.q, key.dq, key.q)
    signature = second + key.qinv * (first - second) % key.p * key.q
    if pow(signature, key.e, key.n) != number:
        raise ValueError("the RSA key is damaged")
    return signature.to_bytes(size, "big")


def base64url(data: bytes) -> str:
    """Base64 as in a JWT: URL-safe, without padding."""
    return base64.urlsafe_b64encode(data).rstrip(b"=").decode("ascii")


def service_account_assertion(info: Mapping[str, Any], now: float) -> str:
    """The signed JWT by which a service account asks for a token (RFC 7523 §2.1). `info` is its key file; `now` in
    epoch seconds. Raises ValueError or KeyError when the file is not one."""
    issued = int(now)
    header = present(alg="RS256", typ="JWT", kid=info.get("private_key_id"))
    claims = {"iss": info["client_email"], "scope": GOOGLE_SCOPE, "aud": GOOGLE_TOKEN_URL, "iat": issued,
              "exp": issued + GOOGLE_LIFETIME_S}
    signed = ".".join(base64url(dumps(part).encode("ascii")) for part in (header, claims))
    return f"{signed}.{base64url(sign_rs256(parse_pem(info['private_key']), signed.encode('ascii')))}"


def adc_path(environ: Mapping[str, str]) -> str:
    """Where gcloud keeps the application default credentials; "" when the environment names no home."""
    if environ.get("CLOUDSDK_CONFIG"):
        folder = environ["CLOUDSDK_CONFIG"]
    elif os.name == "nt":
        folder = os.path.join(environ.get("APPDATA") or environ.get("SystemDrive", "C:") + "\\", "gcloud")
    else:
        folder = os.path.join(environ["HOME"], ".config", "gcloud") if environ.get("HOME") else ""
    return os.path.join(folder, "application_default_credentials.json") if folder else ""


def no_credentials(message: str) -> Unauthorized:
    """The error of a log-in that is missing or over."""
    return Unauthorized(message, code="no_credentials", param="model")


class GoogleToken:
    """One source's token, renewed when it is about to end. One thread renews, the others wait for it; a source that
    failed is left alone for a moment."""

    def __init__(self, fetch: Callable[[], Tuple[str, float]], clock: Callable[[], float]) -> None:
        self._fetch = fetch
        self._clock = clock
        self._lock = threading.Lock()
        self._token = ""
        self._expires_at = 0.0
        self._failure: Optional[GatewayError] = None
        self._retry_at = 0.0

    def get(self) -> str:
        """A token with some life left. Raises what the source raises."""
        with self._lock:
            now = self._clock()
            if now < self._expires_at - GOOGLE_EARLY_S:
                return self._token
            if self._failure is None or now >= self._retry_at:
                self._renew()
            if self._failure is None or (now < self._expires_at and not isinstance(self._failure, Unauthorized)):
                return self._token              # the old one is still good while Google is not
            raise self._failure.again()

    def _renew(self) -> None:
        try:
            self._token, lifetime_s = self._fetch()
            self._expires_at, self._failure = self._clock() + lifetime_s, None
        except GatewayError as error:
            self._failure, self._retry_at = error, self._clock() + GOOGLE_FAILURE_S


class GoogleTokens:
    """Google Cloud's Application Default Credentials: the file that GOOGLE_APPLICATION_CREDENTIALS names, else
    gcloud's, else the metadata server of the machine. Understands authorized_user and service_account files.

    `transport` has `open(call, scope)` as in `Transport`; the metadata server is asked without it, never by a proxy."""

    def __init__(self, transport: Any, clock: Callable[[], float] = time.time,
                 pause: Callable[[float], None] = time.sleep) -> None:
        self._transport = transport
        self._clock = clock
        self._pause = pause
        self._lock = threading.Lock()
        self._sources: Dict[str, GoogleToken] = {}
        self._projects: Dict[str, str] = {}

    def usable(self, environ: Mapping[str, str], entry_env: Mapping[str, str] = MappingProxyType({})) -> bool:
        """Whether there is something to try; opens no connection."""
        settings = {**environ, **entry_env}
        named = settings.get("GOOGLE_APPLICATION_CREDENTIALS") or settings.get("GCE_METADATA_HOST")
        return bool(named or os.path.isfile(adc_path(settings)))

    def token(self, environ: Mapping[str, str], entry_env: Mapping[str, str] = MappingProxyType({})) -> Credential:
        """A credential of kind oauth, its parts project, location and quota_project as far as known. `entry_env` is a
        stored entry's own environment and goes first. Raises `Unauthorized`, code no_credentials, or an
        `UpstreamError` when Google cannot be reached."""
        settings = {**environ, **entry_env}
        info, text = self._read(settings)
        host = metadata_host(settings)
        fetch = functools.partial(self._fetch, info) if info else functools.partial(fetch_metadata_token, host)
        token = self._source(text or host, fetch).get()
        project = settings.get("GOOGLE_CLOUD_PROJECT") or settings.get("GCLOUD_PROJECT") or (
            info.get("project_id") if info else self._project(host))
        parts = present(project=project, location=settings.get("GOOGLE_CLOUD_LOCATION"),
                        quota_project=settings.get("GOOGLE_CLOUD_QUOTA_PROJECT") or info.get("quota_project_id"))
        return Credential("oauth", token, parts={name: value for name, value in parts.items() if value})

    def _read(self, settings: Mapping[str, str]) -> Tuple[Dict[str, Any], str]:
        """(the credentials file, its text), both empty when there is none."""
        named = settings.get("GOOGLE_APPLICATION_CREDENTIALS")
        path = named or adc_path(settings)
        try:
            with open(path, encoding="utf-8-sig") as file:
                text = file.read()
        except (OSError, UnicodeDecodeError):
            if named:                           # named but missing is an error, not a reason to look elsewhere
                raise no_credentials("the file that GOOGLE_APPLICATION_CREDENTIALS names cannot be read") from None
            return {}, ""
        try:
            info = json.loads(text)
        except ValueError:
            info = None
        if not isinstance(info, dict) or info.get("type") not in GOOGLE_GRANTS:
            kind = as_dict(info).get("type")
            raise no_credentials(f'Google Cloud credentials of type "{kind}" are not supported; {GOOGLE_LOGIN}'
                                 if kind else f"the Google Cloud credentials file is not valid JSON; {GOOGLE_LOGIN}")
        return info, text

    def _source(self, key: str, fetch: Callable[[], Tuple[str, float]]) -> GoogleToken:
        """By the file's text, so that a new log-in is a new source."""
        with self._lock:
            return self._sources.setdefault(key, GoogleToken(fetch, self._clock))

    def _project(self, host: str) -> Optional[str]:
        if host not in self._projects:
            self._projects[host] = ask_metadata(host, METADATA_ROOT + "/project/project-id").decode("utf-8", "replace")
        return self._projects[host].strip() or None

    def _fetch(self, info: Mapping[str, Any]) -> Tuple[str, float]:
        """(token, lifetime in seconds) for a credentials file."""
        try:
            form = GOOGLE_GRANTS[info["type"]](info, self._clock())
        except (KeyError, ValueError, TypeError, AttributeError) as error:
            said = f"{error} is missing" if isinstance(error, KeyError) else str(error)
            raise no_credentials(f"the Google Cloud credentials file cannot be used: {said}") from None
        url = info.get("token_uri") if info["type"] == "service_account" else None
        status, body = self._post(url or GOOGLE_TOKEN_URL, form)
        if status != 200:
            raise token_refusal(status, body)
        return read_token(body)

    def _post(self, url: str, form: Mapping[str, str]) -> Tuple[int, bytes]:
        call = Call("POST", url, {"content-type": "application/x-www-form-urlencoded", "accept": "application/json",
                                  "user-agent": USER_AGENT}, urllib.parse.urlencode(form).encode("ascii"))
        for number in range(1, GOOGLE_TRIES + 1):
            response = self._transport.open(call, Scope())
            try:
                status, body = response.status, response.read(MAX_ERROR_BYTES)
            finally:
                response.close()
            if status not in GOOGLE_RETRIED or number == GOOGLE_TRIES:
                break
            self._pause(GOOGLE_PAUSE_S * 2 ** (number - 1))
        return status, body


def _refresh_form(info: Mapping[str, Any], now: float) -> Dict[str, str]:
    return {"grant_type": "refresh_token",
            **{name: str(info[name]) for name in ("client_id", "client_secret", "refresh_token")}}


def _assertion_form(info: Mapping[str, Any], now: float) -> Dict[str, str]:
    return {"grant_type": "urn:ietf:params:oauth:grant-type:jwt-bearer",
            "assertion": service_account_assertion(info, now)}


# type of a credentials file → the form that asks for its token
GOOGLE_GRANTS: Dict[str, Callable[[Mapping[str, Any], float], Dict[str, str]]] = {
    "authorized_user": _refresh_form, "service_account": _assertion_form}


def token_refusal(status: int, body: bytes) -> GatewayError:
    """The error that the token server's answer means: a log-in that is over, or a passing fault."""
    try:
        fields = as_dict(json.loads(body))
    except (ValueError, RecursionError):
        fields = {}
    said = str(fields.get("error_description") or fields.get("error") or f"status {status}")
    if status in GOOGLE_RETRIED or fields.get("error") in GOOGLE_PASSING:
        return UpstreamError(f"Google's token server failed: {said}")
    if fields.get("error") == "invalid_grant":
        return no_credentials(f"the Google Cloud log-in is no longer valid ({said}); {GOOGLE_LOGIN}")
    return no_credentials(f"Google refused the Google Cloud credentials: {said}")


def read_token(body: bytes) -> Tuple[str, float]:
    """(token, lifetime in seconds) of a token server's answer; the lifetime may be a string. Raises
    `UpstreamProtocolError`."""
    try:
        fields = as_dict(json.loads(body))
        return str(fields["access_token"]), float(fields.get("expires_in") or GOOGLE_LIFETIME_S)
    except (KeyError, ValueError, TypeError):
        raise UpstreamProtocolError("Google's token server answered without a token") from None


def metadata_host(settings: Mapping[str, str]) -> str:
    """Host and port of the metadata server; GCE_METADATA_ROOT is the older name of GCE_METADATA_HOST."""
    return next((settings[name] for name in ("GCE_METADATA_HOST", "GCE_METADATA_ROOT", "GCE_METADATA_IP")
                 if settings.get(name)), METADATA_HOST)


def ask_metadata(host: str, path: str) -> bytes:
    """An answer of the metadata server, asked directly. Raises `Unauthorized` when there is none: whatever else answers
    at that address does not name its flavour."""
    connection = http.client.HTTPConnection(host, timeout=METADATA_TIMEOUT_S)
    try:
        connection.request("GET", path, headers=METADATA_HEADERS)
        response = connection.getresponse()
        body = response.read(MAX_ERROR_BYTES)
        if response.status == 200 and response.getheader("Metadata-Flavor") == "Google":
            return body
    except (OSError, http.client.HTTPException, ValueError):
        pass
    finally:
        connection.close()
    raise no_credentials("no Google Cloud credentials: set GOOGLE_APPLICATION_CREDENTIALS or GOOGLE_CLOUD_API_KEY, or "
                         + GOOGLE_LOGIN)


def fetch_metadata_token(host: str) -> Tuple[str, float]:
    """(token, lifetime in seconds) of the machine's service account."""
    return read_token(ask_metadata(host, METADATA_ROOT + "/instance/service-accounts/default/token"))


# --- AWS credentials --------------------------------------------------------------------------------------------------

AWS_EARLY_S = 600.0                 # temporary keys are renewed this long before they expire, as AWS's SDKs do
AWS_STATIC_S = 60.0                 # keys without an end are looked up again after this: a file may change
AWS_FAILED_S = 15.0                 # and a failure is not tried again before this
AWS_ANSWER_S = 10.0                 # STS and SSO answer within this
AWS_CONTAINER_TRIES = 3
AWS_MAX_BYTES = 256 * KIB
AWS_ADVICE = ("no AWS credentials: set AWS_BEARER_TOKEN_BEDROCK, or AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or "
              "AWS_PROFILE")
CONTAINER_HOST = "http://169.254.170.2"
CONTAINER_HOSTS = frozenset({"169.254.170.2", "169.254.170.23", "fd00:ec2::23", "127.0.0.1", "::1", "localhost"})
INSTANCE_HOST = "http://169.254.169.254/latest"
INSTANCE_TOKEN_S = "21600"
STS_VERSION = "2011-06-15"
METADATA_NAMES = ("AccessKeyId", "SecretAccessKey", "Token", "Expiration")


class AwsKeys(NamedTuple):
    """A key pair, the token that goes with a temporary one, and its end in epoch seconds (None: it has none)."""

    access_key_id: str
    secret_access_key: str
    session_token: str = ""
    expires_at: Optional[float] = None

    @property
    def parts(self) -> Dict[str, str]:
        """As the parts of a `Credential`."""
        pieces = zip(self._fields[:3], self[:3])
        return {name: value for name, value in pieces if value}


class AwsLayers:
    """The variables of one provider entry over those of the process."""

    def __init__(self, environ: Mapping[str, str], entry: Mapping[str, str]) -> None:
        self.environ = environ
        self.entry = entry

    def get(self, *names: str) -> str:
        """The first of the variables that is set; "" if none is."""
        return next((value for name in names for value in (self.entry.get(name), self.environ.get(name)) if value), "")

    def keys(self) -> Optional[AwsKeys]:
        """The key pair of one layer: an id is never joined with another layer's secret."""
        for layer in (self.entry, self.environ):
            key_id, secret = layer.get("AWS_ACCESS_KEY_ID"), layer.get("AWS_SECRET_ACCESS_KEY")
            if key_id and secret:
                return AwsKeys(key_id, secret, layer.get("AWS_SESSION_TOKEN") or layer.get("AWS_SECURITY_TOKEN") or "")
        return None

    def path(self, name: str, default: str) -> str:
        """The file that a variable names, or its usual place."""
        home = self.get("HOME", "USERPROFILE") or os.path.expanduser("~")
        path = self.get(name) or default
        return home + path[1:] if path.startswith("~/") else path

    @property
    def identity(self) -> Tuple[Tuple[str, str], ...]:
        """All that a credential may depend on, to remember it by."""
        names = {name for name in (*self.environ, *self.entry)
                 if name.startswith("AWS_") or name in ("HOME", "USERPROFILE")}
        return tuple((name, self.get(name)) for name in sorted(names))


class _Kept(NamedTuple):
    fresh_until: float
    usable_until: float
    result: Union[Credential, Unauthorized]


class AwsCredentials:
    """Finds what authorises calls to AWS, in the order of AWS's own SDKs: bearer token, keys in the environment,
    profiles, container, instance. Temporary keys are renewed ten minutes early, by one thread while the others wait.

    `transport` reaches AWS; `direct` reaches this machine's metadata services: no proxy, short timeouts."""

    def __init__(self, transport: Transport, direct: Transport, clock: Callable[[], float] = time.time) -> None:
        self._transport = transport
        self._direct = direct
        self._clock = clock
        self._locks: Dict[Any, threading.Lock] = {}
        self._kept: Dict[Any, _Kept] = {}

    @staticmethod
    def is_ambient(environ: Mapping[str, str]) -> bool:
        """Whether the environment says that there are credentials; asks nobody and opens nothing. Keys in files without
        AWS_PROFILE do not count, so that a machine's own AWS account is not used by accident."""
        pair = environ.get("AWS_ACCESS_KEY_ID") and environ.get("AWS_SECRET_ACCESS_KEY")
        return bool(pair or any(environ.get(name) for name in (
            "AWS_PROFILE", "AWS_BEARER_TOKEN_BEDROCK", "AWS_CONTAINER_CREDENTIALS_RELATIVE_URI",
            "AWS_CONTAINER_CREDENTIALS_FULL_URI", "AWS_WEB_IDENTITY_TOKEN_FILE")))

    def get(self, environ: Mapping[str, str], entry_env: Mapping[str, str] = MappingProxyType({}),
            stored_key: Optional[str] = None) -> Credential:
        """The credential: kind api_key (then `token` is a bearer token) or aws (then `parts` has the key pair). `parts`
        of either may have `region`, `profile_region`, `skip_auth` and `force_cache`. `entry_env` and `stored_key` are
        the provider's own in auth.json and win. Raises `Unauthorized`, code no_credentials."""
        layers = AwsLayers(environ, entry_env)
        identity = (layers.identity, stored_key)
        kept = self._kept.get(identity)
        if kept is None or self._clock() >= kept.fresh_until:
            with self._locks.setdefault(identity, threading.Lock()):
                kept = self._kept.get(identity)
                if kept is None or self._clock() >= kept.fresh_until:
                    kept = self._kept[identity] = self._renew(kept, layers, stored_key)
        if isinstance(kept.result, Unauthorized):
            raise unauthorized_aws(kept.result.message)
        return kept.result

    def _renew(self, kept: Optional[_Kept], layers: AwsLayers, stored_key: Optional[str]) -> _Kept:
        now = self._clock()
        try:
            found = self._find(layers, stored_key)
        except GatewayError as error:
            if kept and now < kept.usable_until:        # the old keys still have some minutes
                return kept._replace(fresh_until=min(now + AWS_FAILED_S, kept.usable_until))
            message = error.message if isinstance(error, Unauthorized) else f"no AWS credentials: {error.message}"
            return _Kept(now + AWS_FAILED_S, now, unauthorized_aws(message))
        credential, expires_at = found
        if expires_at is None:
            return _Kept(now + AWS_STATIC_S, now, credential)
        return _Kept(max(expires_at - AWS_EARLY_S, min(now + AWS_STATIC_S, expires_at)), expires_at, credential)

    def _find(self, layers: AwsLayers, stored_key: Optional[str]) -> Tuple[Credential, Optional[float]]:
        parts = {"force_cache": "1"} if is_set(layers.get("AWS_BEDROCK_FORCE_CACHE")) else {}
        chain = AwsChain(layers, self._ask, self._clock)
        parts.update(chain.regions())
        if is_set(layers.get("AWS_BEDROCK_SKIP_AUTH")):
            return Credential("aws", parts={**parts, "skip_auth": "1"}), None
        token = stored_key if stored_key and stored_key != SENTINEL else layers.get("AWS_BEARER_TOKEN_BEDROCK")
        if token:
            return Credential("api_key", token, parts=parts), None
        keys = chain.find()
        return Credential("aws", parts={**parts, **keys.parts}), keys.expires_at

    def _ask(self, call: Call, is_local: bool) -> bytes:
        """The body of an answer with status 200. Raises `UpstreamError` for any other, and when none comes in time."""
        scope = Scope()
        host = urllib.parse.urlsplit(call.url).netloc
        late = UpstreamTimeout(f"{host} did not answer within {AWS_ANSWER_S:g} seconds")
        timer = threading.Timer(AWS_ANSWER_S, scope.cancel, [late])
        timer.daemon = True
        timer.start()
        try:
            response = (self._direct if is_local else self._transport).open(call, scope)
            try:
                body = response.read(AWS_MAX_BYTES)
            finally:
                response.close()
        finally:
            timer.cancel()
        if response.status != 200:
            raise aws_refusal(response.status, host, body)
        return body


def is_set(value: str) -> bool:
    """Whether a variable's value means yes."""
    return value.strip().lower() in ("1", "true", "yes", "on")


def unauthorized_aws(message: str) -> Unauthorized:
    """A fresh error, since an exception that is raised twice keeps both tracebacks."""
    return Unauthorized(message, code="no_credentials", param="model")


def aws_refusal(status: int, host: str, body: bytes) -> UpstreamError:
    """The error for an answer of STS, SSO or a metadata service that is not 200; STS says why in XML."""
    said = re.search(rb"<Message>(.*?)</Message>", body, re.DOTALL)
    message = said.group(1).decode("utf-8", "replace") if said else error_fields(body)[0]
    return UpstreamError(f"{host} answered {status}" + (f": {message}" if message else ""))


class AwsChain:
    """One walk through the places where AWS keys may be. `ask(call, is_local)` sends a call and returns the body."""

    def __init__(self, layers: AwsLayers, ask: Callable[[Call, bool], bytes], clock: Callable[[], float]) -> None:
        self._layers = layers
        self._ask = ask
        self._clock = clock
        self._named = layers.get("AWS_PROFILE", "AWS_DEFAULT_PROFILE")

    @functools.cached_property
    def _config(self) -> Dict[str, Dict[str, str]]:
        return read_profiles(self._layers.path("AWS_CONFIG_FILE", "~/.aws/config"))

    @functools.cached_property
    def _shared(self) -> Dict[str, Dict[str, str]]:
        return read_profiles(self._layers.path("AWS_SHARED_CREDENTIALS_FILE", "~/.aws/credentials"))

    def regions(self) -> Dict[str, str]:
        """`region`: as configured, by variable or by a profile that was chosen; `profile_region`: the profile's, chosen
        or default. A broken file is no matter here: who has a bearer token needs none."""
        region = self._layers.get("AWS_REGION", "AWS_DEFAULT_REGION")
        try:
            of_profile = self._profile(self._named or "default").get("region", "")
        except Unauthorized:
            of_profile = ""
        found = {"region": region or (of_profile if self._named else ""), "profile_region": of_profile}
        return {name: value for name, value in found.items() if value}

    def find(self) -> AwsKeys:
        """The keys. A profile chosen for the provider itself goes before keys in the environment, one that is merely in
        the environment behind them. Raises `Unauthorized` that says what to set."""
        explicit = self._layers.entry.get("AWS_PROFILE")
        keys = None if explicit else self._layers.keys()
        keys = keys or (None if explicit else self._web_identity_of_environment())
        keys = keys or self._of_profile(explicit or self._named or "default", ())
        keys = keys or self._container() or self._instance()
        if keys is None:
            hint = f'; the profile "{self._named}" has no keys' if self._named else ""
            raise unauthorized_aws(AWS_ADVICE + hint)
        return keys

    # profiles

    def _of_config(self, name: str) -> Dict[str, str]:
        return self._config.get(f"profile {name}") or (self._config.get(name, {}) if name == "default" else {})

    def _profile(self, name: str) -> Dict[str, str]:
        return {**self._of_config(name), **self._shared.get(name, {})}

    def _of_profile(self, name: str, seen: Tuple[str, ...]) -> Optional[AwsKeys]:
        """The keys of a profile; `seen` are the profiles whose role they are for."""
        profile = self._profile(name)
        if not profile and name != "default":
            raise unauthorized_aws(f'no AWS profile "{name}" in ~/.aws/config or ~/.aws/credentials; check AWS_PROFILE')
        for needed, method in self._steps:
            has_all = all(profile.get(key) for key in needed)
            if has_all and not ("role_arn" in needed and name in seen):     # a profile may be its own source
                keys = method(self, name, profile, seen)
                if keys:
                    return keys
        return None

    def _assume_from_profile(self, name: str, profile: Mapping[str, str], seen: Tuple[str, ...]) -> AwsKeys:
        source = profile["source_profile"]
        if source in seen:
            raise unauthorized_aws(f'the AWS profiles {" → ".join((*seen, name, source))} form a ring')
        keys = self._of_profile(source, (*seen, name))
        return self._assume(name, profile, keys, f'profile "{source}"')

    def _assume_from_source(self, name: str, profile: Mapping[str, str], seen: Tuple[str, ...]) -> AwsKeys:
        source = profile["credential_source"]
        sources = {"Environment": self._layers.keys, "EcsContainer": self._container,
                   "Ec2InstanceMetadata": self._instance}
        if source not in sources:
            raise unauthorized_aws(f'the AWS profile "{name}" has an unknown credential_source; known: '
                                   f'{", ".join(sources)}')
        return self._assume(name, profile, sources[source](), source)

    def _assume(self, name: str, profile: Mapping[str, str], keys: Optional[AwsKeys], source: str) -> AwsKeys:
        if keys is None:
            raise unauthorized_aws(f'the AWS profile "{name}" takes its keys from {source}, which has none')
        if profile.get("mfa_serial"):
            raise unauthorized_aws(f'the AWS profile "{name}" wants a one-time code, which nobody can type here; use a '
                                   "profile without mfa_serial, or keys that `aws sts` gave")
        extra = {"ExternalId": profile["external_id"]} if profile.get("external_id") else {}
        return self._sts("AssumeRole", profile, {**extra, "DurationSeconds": profile.get("duration_seconds") or "3600"},
                         keys)

    def _web_identity(self, name: str, profile: Mapping[str, str], seen: Tuple[str, ...]) -> AwsKeys:
        token = read_text(self._layers.path("", profile["web_identity_token_file"]), "the AWS web identity token")
        return self._sts("AssumeRoleWithWebIdentity", profile, {"WebIdentityToken": token}, None)

    def _web_identity_of_environment(self) -> Optional[AwsKeys]:
        profile = {"web_identity_token_file": self._layers.get("AWS_WEB_IDENTITY_TOKEN_FILE"),
                   "role_arn": self._layers.get("AWS_ROLE_ARN"),
                   "role_session_name": self._layers.get("AWS_ROLE_SESSION_NAME")}
        has_both = profile["web_identity_token_file"] and profile["role_arn"]
        return self._web_identity("", profile, ()) if has_both else None

    def _sts(self, action: str, profile: Mapping[str, str], fields: Mapping[str, str], keys: Optional[AwsKeys],
             ) -> AwsKeys:
        regions = self.regions()
        region = profile.get("region") or regions.get("region") or regions.get("profile_region") or AWS_DEFAULT_REGION
        form = {"Action": action, "Version": STS_VERSION, "RoleArn": profile["role_arn"],
                "RoleSessionName": profile.get("role_session_name") or NAME, **fields}
        call = Call("POST", f"https://{aws_host('sts', region)}/",
                    {"content-type": "application/x-www-form-urlencoded; charset=utf-8", "user-agent": USER_AGENT},
                    urllib.parse.urlencode(form).encode("ascii"))
        if keys:
            call = sign_v4(call, keys.parts, region, "sts", self._clock())
        return read_sts(self._ask(call, False))

    def _sso(self, name: str, profile: Mapping[str, str], seen: Tuple[str, ...]) -> AwsKeys:
        """By the token that `aws sso login` left; it is not renewed here, so that the CLI's own stays valid."""
        session = self._config.get(f"sso-session {profile.get('sso_session')}", {})
        region = session.get("sso_region") or profile.get("sso_region") or AWS_DEFAULT_REGION
        key = profile.get("sso_session") or profile.get("sso_start_url") or ""
        file = hashlib.sha1(key.encode("utf-8")).hexdigest() + ".json"
        cached = self._sso_token(self._layers.path("", f"~/.aws/sso/cache/{file}"), name)
        query = urllib.parse.urlencode({"role_name": profile["sso_role_name"], "account_id": profile["sso_account_id"]})
        call = Call("GET", f"https://{aws_host('portal.sso', region)}/federation/credentials?{query}",
                    {"x-amz-sso_bearer_token": cached, "accept": "application/json", "user-agent": USER_AGENT})
        found = as_dict(parse_answer(self._ask(call, False)).get("roleCredentials"))
        return keys_of(found, "accessKeyId", "secretAccessKey", "sessionToken", "expiration")

    def _sso_token(self, path: str, name: str) -> str:
        try:
            cached = as_dict(json.loads(read_text(path, "the SSO log-in")))
            if parse_time(cached.get("expiresAt")) > self._clock():
                return str(cached["accessToken"])
        except (GatewayError, KeyError, TypeError, ValueError):
            pass
        raise unauthorized_aws(f'the AWS log-in of profile "{name}" is missing or has expired: run '
                               f"aws sso login --profile {name}")

    def _static_shared(self, name: str, profile: Mapping[str, str], seen: Tuple[str, ...]) -> Optional[AwsKeys]:
        return static_keys(self._shared.get(name, {}))

    def _static_config(self, name: str, profile: Mapping[str, str], seen: Tuple[str, ...]) -> Optional[AwsKeys]:
        return static_keys(self._of_config(name))

    def _process(self, name: str, profile: Mapping[str, str], seen: Tuple[str, ...]) -> AwsKeys:
        """From a command, run without a shell, that prints JSON."""
        try:
            done = subprocess.run(shlex.split(profile["credential_process"], posix=os.name != "nt"), check=True,
                                  stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
                                  timeout=COMMAND_TIMEOUT_S, env=dict(self._layers.environ))
            found = as_dict(json.loads(done.stdout))
        except (OSError, ValueError, subprocess.SubprocessError) as error:
            raise unauthorized_aws(f'the credential_process of AWS profile "{name}" failed ({type(error).__name__}); '
                                   "run it by hand to see why") from None
        if found.get("Version") != 1:
            raise unauthorized_aws(f'the credential_process of AWS profile "{name}" did not print "Version": 1')
        return keys_of(found, "AccessKeyId", "SecretAccessKey", "SessionToken", "Expiration")

    # In botocore's order.
    _steps: Tuple[Tuple[Tuple[str, ...], Callable[..., Optional[AwsKeys]]], ...] = (
        (("role_arn", "source_profile"), _assume_from_profile),
        (("role_arn", "credential_source"), _assume_from_source),
        (("role_arn", "web_identity_token_file"), _web_identity), (("sso_account_id", "sso_role_name"), _sso),
        (("aws_access_key_id",), _static_shared), (("credential_process",), _process),
        (("aws_access_key_id",), _static_config))

    # metadata services

    def _container(self) -> Optional[AwsKeys]:
        """ECS, EKS and Greengrass: URL and token are in the environment. Only AWS's own hosts may see the token."""
        relative, full = (self._layers.get(f"AWS_CONTAINER_CREDENTIALS_{kind}_URI") for kind in ("RELATIVE", "FULL"))
        if not relative and not full:
            return None
        url = CONTAINER_HOST + "/" + relative.lstrip("/") if relative else full
        split = urllib.parse.urlsplit(url)
        is_local = split.hostname in CONTAINER_HOSTS
        if split.scheme != "https" and not (split.scheme == "http" and is_local):
            raise unauthorized_aws("AWS_CONTAINER_CREDENTIALS_FULL_URI must be https, or http on this machine or at "
                                   "AWS's own addresses")
        call = Call("GET", url, {"accept": "application/json", "user-agent": USER_AGENT, **self._container_token()})
        return keys_of(parse_answer(self._persist(call, is_local)), *METADATA_NAMES)

    def _container_token(self) -> Dict[str, str]:
        path = self._layers.get("AWS_CONTAINER_AUTHORIZATION_TOKEN_FILE")
        token = (read_text(path, "AWS_CONTAINER_AUTHORIZATION_TOKEN_FILE") if path
                 else self._layers.get("AWS_CONTAINER_AUTHORIZATION_TOKEN"))
        if re.search(r"[\r\n]", token):
            raise unauthorized_aws("the AWS container authorization token has a line break in it")
        return {"authorization": token} if token else {}

    def _persist(self, call: Call, is_local: bool) -> bytes:
        for _ in range(AWS_CONTAINER_TRIES - 1):
            try:
                return self._ask(call, is_local)
            except UpstreamError:
                continue
        return self._ask(call, is_local)

    def _instance(self) -> Optional[AwsKeys]:
        """The role of an EC2 machine (metadata service, version 2); None elsewhere."""
        if is_set(self._layers.get("AWS_EC2_METADATA_DISABLED")):
            return None
        path = f"{INSTANCE_HOST}/meta-data/iam/security-credentials/"
        try:
            token = self._ask(Call("PUT", f"{INSTANCE_HOST}/api/token",
                                   {"x-aws-ec2-metadata-token-ttl-seconds": INSTANCE_TOKEN_S}), True)
            headers = {"x-aws-ec2-metadata-token": token.decode("ascii").strip()}
            role = self._ask(Call("GET", path, headers), True).decode("ascii").strip().partition("\n")[0].strip()
            found = parse_answer(self._ask(Call("GET", path + urllib.parse.quote(role), headers), True))
        except (UpstreamError, ValueError):
            return None                         # not on EC2, or no role
        return keys_of(found, *METADATA_NAMES) if found.get("Code", "Success") == "Success" else None


def read_profiles(path: str) -> Dict[str, Dict[str, str]]:
    """The sections of an AWS file, {} when there is none. Raises `Unauthorized` when it cannot be read as one."""
    parser = configparser.RawConfigParser(default_section=None)     # type: ignore[arg-type]  # raw: secrets hold %
    try:
        with open(path, encoding="utf-8-sig") as file:
            parser.read_file(file)
        return {" ".join(shlex.split(name) if '"' in name else name.split()): dict(parser.items(name))
                for name in parser.sections()}
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, configparser.Error) as error:
        name = os.path.basename(path)
        raise unauthorized_aws(f"the AWS file {name} cannot be read ({type(error).__name__})") from None


def static_keys(section: Mapping[str, str]) -> Optional[AwsKeys]:
    """The key pair that a section spells out: a pair is never made of two files."""
    key_id, secret = section.get("aws_access_key_id"), section.get("aws_secret_access_key")
    return AwsKeys(key_id, secret, section.get("aws_session_token", "")) if key_id and secret else None


def read_text(path: str, what: str) -> str:
    """A small file's text without blanks around. Raises `Unauthorized` that names `what`, not the path."""
    try:
        with open(path, encoding="utf-8") as file:
            return file.read(AWS_MAX_BYTES).strip()
    except (OSError, ValueError) as error:
        raise unauthorized_aws(f"{what} cannot be read ({type(error).__name__})") from None


def parse_time(value: Any) -> float:
    """Epoch seconds of an ISO 8601 time ("2026-01-02T03:04:05Z", "…UTC", "…+00:00"), or of milliseconds. Raises
    ValueError."""
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        return value / 1000
    text = re.sub(r"\.\d+", "", str(value).replace("UTC", "Z").replace("Z", "+00:00"))
    moment = datetime.datetime.fromisoformat(text)
    return (moment if moment.tzinfo else moment.replace(tzinfo=datetime.timezone.utc)).timestamp()


def keys_of(found: Mapping[str, Any], key_id: str, secret: str, token: str, expiration: str) -> AwsKeys:
    """The keys under these names of an answer; each of AWS's services has its own. Raises `UpstreamError`."""
    pieces = [found.get(name) for name in (key_id, secret)]
    if not all(isinstance(piece, str) and piece for piece in pieces):
        raise UpstreamError("the answer has no AWS keys")
    try:
        expires_at = parse_time(found[expiration]) if found.get(expiration) else None
    except ValueError:
        raise UpstreamError("the AWS keys have an unreadable end") from None
    return AwsKeys(str(pieces[0]), str(pieces[1]), str(found.get(token) or ""), expires_at)


def read_sts(body: bytes) -> AwsKeys:
    """The keys in STS's XML answer; four elements without attributes or entities."""
    names = ("AccessKeyId", "SecretAccessKey", "SessionToken", "Expiration")
    found = {}
    for name in names:
        match = re.search(f"<{name}>\\s*([^<]*?)\\s*</{name}>", body.decode("utf-8", "replace"))
        found[name] = match.group(1) if match else ""
    return keys_of(found, *names)


# ======================================================================================================================
# §11 HTTP client
# ======================================================================================================================


class Scope:
    """Everything that one request may have to give up: waits for the provider end early when the client leaves, when
    the limit is reached, or when the server stops; meanwhile they beat, so that the client hears something.

    Only the request's own thread waits; `cancel` may come from any thread."""

    def __init__(self, client: Optional[socket.socket] = None, heartbeat_s: float = 15.0,
                 on_beat: Callable[[], None] = lambda: None) -> None:
        self._client = client
        self._heartbeat_s = heartbeat_s
        self.on_beat = on_beat
        self._cancelled: Optional[GatewayError] = None
        self._upstream: Optional[socket.socket] = None
        self._upstream_lock = threading.Lock()
        self._poller: Optional[Poller] = None
        self._client_spoke = False
        self._beat_at = 0.0
        self.put_off_beat()

    def put_off_beat(self) -> None:
        """The client has just heard something."""
        self._beat_at = time.monotonic() + self._heartbeat_s

    def attach(self, upstream: Optional[socket.socket]) -> None:
        """Names the socket that `cancel` is to cut off."""
        self._upstream = upstream
        self.check()

    def detach(self) -> None:
        """The socket is another request's from now on."""
        with self._upstream_lock:
            self._upstream = None

    def cancel(self, error: GatewayError) -> None:
        """Ends the request's current and later waits with `error`."""
        self._cancelled = error
        with self._upstream_lock:
            if self._upstream is not None:
                with contextlib.suppress(OSError):
                    # not SSLSocket.shutdown, which takes the TLS layer away under the thread that reads
                    socket.socket.shutdown(self._upstream, socket.SHUT_RDWR)

    def check(self) -> None:
        """Raises what `cancel` was given."""
        if self._cancelled is not None:
            raise self._cancelled

    def wait(self, upstream: Optional[socket.socket], limit_s: float) -> bool:
        """Waits until `upstream` can be read; False when that takes `limit_s`. Raises `ClientGone`, or what `cancel` was
        given."""
        if self._poller is None or self._poller.first is not upstream:
            self._poller = Poller(upstream, self._client, self._client_spoke)
        now = time.monotonic()
        deadline = now + limit_s
        while True:
            if self._cancelled is not None:
                raise self._cancelled
            ready = self._poller.wait(min(deadline, self._beat_at) - now)
            if ready and (upstream not in ready or len(ready) > 1):     # a busy provider must not hide a client's end
                self._check_client()
                self._poller = Poller(upstream, self._client, self._client_spoke)
            now = time.monotonic()
            if now >= self._beat_at:            # also beside a provider that sends comments, which nobody sees
                self.put_off_beat()
                self.on_beat()
            if upstream in ready and upstream is not None:
                self.check()
                return True
            if now >= deadline:
                return False

    def _check_client(self) -> None:
        """Tells a client that left from one that already sends its next request (no longer watched then)."""
        try:
            if self._client is not None and not self._client_spoke and self._client.recv(1, socket.MSG_PEEK):
                self._client_spoke = True       # its next request: from now on only its end counts
                return
        except BlockingIOError:                 # woken for nothing
            return
        except OSError:
            pass
        raise ClientGone


class Poller:
    """Waits for one or two sockets to become readable. `poll` where there is one, since `select` ends at descriptor 1024;
    made once for many waits."""

    def __init__(self, first: Optional[socket.socket], second: Optional[socket.socket] = None,
                 end_only: bool = False) -> None:
        self.first = first
        if end_only and not hasattr(select, "POLLRDHUP"):
            second = None
        self._socks = [sock for sock in (first, second) if sock is not None]
        self._poll = select.poll() if hasattr(select, "poll") else None
        if self._poll:
            for sock in self._socks:
                self._poll.register(sock, select.POLLRDHUP if sock is second and end_only else select.POLLIN)

    def wait(self, timeout_s: float) -> List[socket.socket]:
        """The sockets that have data or an end to read, after at most `timeout_s`."""
        timeout_s = max(0.0, timeout_s)
        if self._poll:
            ready = [fd for fd, _ in self._poll.poll(timeout_s * 1000)]
            return [sock for sock in self._socks if sock.fileno() in ready] if ready else []
        if not self._socks:                     # Windows cannot select nothing
            time.sleep(timeout_s)
            return []
        return list(select.select(self._socks, [], [], timeout_s)[0])


def send_all(sock: socket.socket, data: bytes, timeout_s: float) -> None:
    """Sends everything on a non-blocking socket; raises OSError, `socket.timeout` when the other side takes nothing for
    that long. A socket with a timeout of its own would ask the system twice for every send."""
    view = memoryview(data)
    while view:
        try:
            view = view[sock.send(view):]
        except BlockingIOError:
            if hasattr(select, "poll"):
                poll = select.poll()
                poll.register(sock, select.POLLOUT)
                is_ready = bool(poll.poll(timeout_s * 1000))
            else:
                is_ready = bool(select.select([], [sock], [], timeout_s)[1])
            if not is_ready:
                raise socket.timeout("the other side reads nothing") from None


class Limits(NamedTuple):
    """How long a provider may take, in seconds: to connect, to begin its answer, and between two pieces of it."""

    connect_s: float = 10.0
    first_byte_s: float = 600.0
    idle_s: float = 300.0


class Response:
    """A provider's answer: status, headers (names in lower case), and the body as an iterator of pieces, each of them
    all that one receive brought. Ends when the body does; raises `UpstreamProtocolError` when it is cut."""

    _INFLATED_BYTES = 8 * MIB

    def __init__(self, status: int, headers: Mapping[str, str], connection: Connection, rest: bytes, scope: Scope,
                 idle_s: float) -> None:
        self.status = status
        self.headers = headers
        self._connection = connection
        self._rest = rest
        self._scope = scope
        self._idle_s = idle_s
        self._complete = False
        self._length = 0 if status in (204, 304) else body_length(headers)
        self._dechunker = Dechunker() if self._length is None else None
        coding = headers.get("content-encoding", "identity").lower()
        self._inflate = zlib.decompressobj(47) if coding in ("gzip", "x-gzip", "deflate") else None

    def __iter__(self) -> Iterator[bytes]:
        data = self._rest
        self._rest = b""
        while True:
            piece = self._decode(data) if data else b""
            if piece:
                yield piece
            if self._complete or self._length == 0:
                self._complete = True
                return
            data = self._connection.receive(self._scope, self._idle_s)
            if not data:
                if self._length == -1:          # the body ends with the connection
                    return
                raise UpstreamProtocolError("the provider closed the connection in the middle of its answer")

    def _decode(self, data: bytes) -> bytes:
        try:
            if self._dechunker:
                data = self._dechunker.feed(data)
                self._complete = self._dechunker.done
            elif self._length is not None and self._length >= 0:
                data = data[:self._length]
                self._length -= len(data)
                self._complete = self._length == 0
            if not self._inflate:
                return data
            if self._inflate.eof:               # zlib keeps, and copies, all that follows
                return b""
            data = self._inflate.decompress(data, self._INFLATED_BYTES)
            if self._inflate.unconsumed_tail:
                raise ValueError("compressed beyond reason")
            return data
        except (ValueError, zlib.error) as error:
            raise UpstreamProtocolError(f"the provider's answer is malformed: {error}") from None

    def read(self, limit: int) -> bytes:
        """The whole body. Raises `UpstreamProtocolError` when it is longer than `limit` bytes."""
        pieces, size = [], 0
        for piece in self:
            pieces.append(piece)
            size += len(piece)
            if size > limit:
                raise UpstreamProtocolError(f"the provider's answer is longer than {limit} bytes")
        return b"".join(pieces)

    def close(self) -> None:
        """Gives the connection back if the answer was read to its end, or its end is already here; else closes it."""
        connection, scope, self._scope = self._connection, self._scope, Scope()
        if not self._complete and self._length != -1:
            try:
                for _ in range(2):              # behind the last event: the empty chunk that ends the body
                    data = self._rest or connection.receive(self._scope, DRAIN_S)
                    self._rest = b""
                    self._decode(data)
                    if self._complete or not data:
                        break
            except (GatewayError, OSError):
                pass
        scope.detach()
        connection.release(self._complete and self.headers.get("connection", "").lower() != "close")


class Connection:
    """A connection to a provider (or to the proxy before it): `http.client` opens it, with tunnel and TLS; requests are
    written and answers read here, one send and few receives each."""

    def __init__(self, opened: http.client.HTTPConnection, pool: Pool, key: Any) -> None:
        self._opened = opened
        self._pool = pool
        self._key = key
        self.sock: socket.socket = opened.sock
        self._is_tls = hasattr(self.sock, "pending")
        self.sock.setblocking(False)
        self.idle_since = 0.0

    def send(self, data: bytes, timeout_s: float) -> None:
        """Sends everything."""
        if self._is_tls:
            self.sock.settimeout(timeout_s)
            self.sock.sendall(data)
            self.sock.setblocking(False)
        else:
            send_all(self.sock, data, timeout_s)

    def receive(self, scope: Scope, limit_s: float) -> bytes:
        """What has arrived, b"" at the end; waits for it. Raises `UpstreamTimeout`."""
        while True:
            # TLS: bytes that are already decrypted do not show on the socket
            is_waiting = self._is_tls and self.sock.pending()  # type: ignore[attr-defined]
            if not is_waiting and not scope.wait(self.sock, limit_s):
                raise UpstreamTimeout(f"the provider sent nothing for {limit_s:g} seconds")
            try:
                return self.sock.recv(RECEIVE_BYTES)
            except BlockingIOError:             # woken for nothing
                continue
            except OSError as error:
                if type(error).__name__ == "SSLWantReadError":      # part of a record, or a session ticket
                    continue
                scope.check()
                raise UpstreamProtocolError(f"the connection to the provider broke: {describe(error)}") from None

    def is_stale(self) -> bool:
        """Whether the other side has closed it, or sent what nobody asked for."""
        return bool(Poller(self.sock).wait(0))

    def release(self, is_reusable: bool) -> None:
        """Back to the pool, or closed."""
        if not (is_reusable and self._pool.put(self._key, self)):
            self.close()

    def close(self) -> None:
        """Closes the connection."""
        self._opened.close()


class Pool:
    """Idle connections by destination; the most recently used is taken first."""

    def __init__(self, per_host: int = POOL_PER_HOST) -> None:
        self._lock = threading.Lock()
        self._per_host = per_host
        self._idle: Dict[Any, List[Connection]] = {}
        self._closed = False

    def take(self, key: Any) -> Optional[Connection]:
        """An idle connection that still looks alive."""
        while True:
            with self._lock:
                connections = self._idle.get(key)
                if not connections:
                    return None
                connection = connections.pop()
            if time.monotonic() - connection.idle_since < POOL_IDLE_S and not connection.is_stale():
                return connection
            connection.close()

    def put(self, key: Any, connection: Connection) -> bool:
        """Keeps a connection; False when there is no room."""
        connection.idle_since = time.monotonic()
        with self._lock:
            connections = self._idle.setdefault(key, [])
            if self._closed or len(connections) >= self._per_host:
                return False
            connections.append(connection)
            return True

    def reap(self) -> None:
        """Closes what has been idle for too long, or was closed by its other side."""
        dead: List[Connection] = []
        now = time.monotonic()
        with self._lock:
            for key, connections in list(self._idle.items()):
                kept = [one for one in connections if now - one.idle_since < POOL_IDLE_S and not one.is_stale()]
                dead.extend(one for one in connections if one not in kept)
                self._idle[key] = kept
                if not kept:
                    del self._idle[key]
        for connection in dead:
            connection.close()

    def close(self) -> None:
        """Closes what is idle, and everything that comes back later."""
        with self._lock:
            self._closed = True
            idle, self._idle = self._idle, {}
        for connections in idle.values():
            for connection in connections:
                connection.close()


def describe(error: BaseException) -> str:
    """An operating-system error in words, without numbers or paths."""
    text = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    return re.sub(r"^\[[A-Z0-9_: ]*\] | \(_ssl\.c:\d+\)", "", text) or type(error).__name__


class PooledHandler(urllib.request.BaseHandler):
    """The part of `urllib.request` that talks to servers, with kept connections; the stock one closes after each answer.
    Proxies have been put into the request by `ProxyHandler` before it arrives here."""

    def __init__(self, limits: Limits, ca_bundle: Optional[str], keep: int, connect: Callable[..., socket.socket]) -> None:
        self.pool = Pool(keep)
        self._connect = connect
        self._limits = limits
        self._ca_bundle = ca_bundle
        self._context: Any = None
        self._context_lock = threading.Lock()

    def http_open(self, request: ScopedRequest) -> Response:
        """An http URL, or any URL through a plain proxy."""
        return self.do_open(http.client.HTTPConnection, request)

    def https_open(self, request: ScopedRequest) -> Response:
        """An https URL."""
        return self.do_open(functools.partial(http.client.HTTPSConnection, context=self._tls()), request)

    def _tls(self) -> Any:
        """One TLS context for the process: making one takes some 30 ms."""
        with self._context_lock:
            if self._context is None:
                import ssl                      # not needed by those who only use local servers
                self._context = ssl.create_default_context(cafile=self._ca_bundle)
            return self._context

    def do_open(self, connect: Callable[..., http.client.HTTPConnection], request: ScopedRequest) -> Response:
        """Sends the request on a kept connection, or a new one; a kept one that fails before any byte of an answer was
        closed by its other side meanwhile, and the request is sent once more on a new one."""
        tunnel = getattr(request, "_tunnel_host", None)
        key = (request.type, request.host, tunnel)
        message = self._head(request) + (request.data or b"")
        kept = self.pool.take(key)
        if kept:
            try:
                return self._exchange(kept, message, request.scope)
            except (StaleConnection, ConnectionError):
                request.scope.check()
        opened = connect(request.host, timeout=self._limits.connect_s)
        if not (tunnel or request.has_proxy()):           # the proxy's own address is none of the caller's choice
            opened._create_connection = self._connect       # type: ignore[attr-defined]
        if tunnel:
            proxy_auth = {name: value for name, value in {**request.unredirected_hdrs, **request.headers}.items()
                          if name.lower() == "proxy-authorization"}
            opened.set_tunnel(tunnel, headers=proxy_auth)
        opened.connect()
        connection = Connection(opened, self.pool, key)
        try:
            return self._exchange(connection, message, request.scope)
        except StaleConnection:
            raise UpstreamProtocolError("the provider closed the connection without an answer") from None

    def _head(self, request: ScopedRequest) -> bytes:
        host = getattr(request, "_tunnel_host", None) or urllib.parse.urlsplit(request.full_url).netloc.rpartition("@")[2]
        lines = [f"{request.get_method()} {request.selector or '/'} HTTP/1.1", f"Host: {host}"]
        for name, value in {**request.unredirected_hdrs, **request.headers}.items():
            if not _HEADER_LINE.fullmatch(f"{name}: {value}".encode("latin-1", "replace")):
                raise BadRequest(f"the header {name!r} cannot be sent: it has a line break or another stray character")
            if name.lower() != "proxy-authorization" or not getattr(request, "_tunnel_host", None):
                lines.append(f"{name}: {value}")
        if request.data is not None:
            lines.append(f"Content-Length: {len(request.data)}")
        try:
            return ("\r\n".join(lines) + "\r\n\r\n").encode("latin-1")
        except UnicodeEncodeError:
            raise Unauthorized("a header or key for the provider has a character that HTTP cannot carry",
                               code="no_credentials") from None

    def _exchange(self, connection: Connection, message: bytes, scope: Scope) -> Response:
        try:
            scope.attach(connection.sock)
            connection.send(message, self._limits.idle_s)
            return self._read_head(connection, scope)
        except BaseException:
            connection.close()
            raise

    def _read_head(self, connection: Connection, scope: Scope) -> Response:
        buffer = b""
        while True:
            end = buffer.find(b"\r\n\r\n")
            if end >= 0:
                start, headers = self._parse_head(buffer[:end])
                buffer = buffer[end + 4:]
                status = int(start.split(" ", 2)[1])
                if status >= 200:
                    return Response(status, headers, connection, buffer, scope, self._limits.idle_s)
                continue                        # 100 Continue, 103 Early Hints
            if len(buffer) > MAX_HEAD_BYTES:
                raise UpstreamProtocolError("the provider's answer has too long a head")
            try:
                data = connection.receive(scope, self._limits.first_byte_s)
            except UpstreamProtocolError:
                data = b""
            if not data:
                if buffer:
                    raise UpstreamProtocolError("the provider closed the connection in the middle of its answer")
                raise StaleConnection
            buffer += data

    def _parse_head(self, head: bytes) -> Tuple[str, Dict[str, str]]:
        try:
            start, headers = parse_head(head)
            body_length(headers)
            if not re.match(r"HTTP/1\.[01] \d{3}(?: |$)", start):
                raise ValueError("not HTTP/1.1")
            return start, headers
        except ValueError as error:
            raise UpstreamProtocolError(f"the provider's answer is not HTTP: {error}") from None


class StaleConnection(Exception):
    """A connection ended before the first byte of an answer."""


class ScopedRequest(urllib.request.Request):
    """A `urllib.request.Request` that carries its scope to the handler."""

    scope: Scope


class Opener(urllib.request.OpenerDirector):
    """The stock opener makes up the names of handlers' methods anew for each request, and the interpreter's method cache
    keeps such strings: one made while a large request is under way would hold a whole arena of its memory."""

    def _call_chain(self, chain: Any, kind: str, meth_name: str, *args: Any) -> Any:
        return super()._call_chain(chain, kind, sys.intern(meth_name), *args)   # type: ignore[misc]


class DemoHandler(urllib.request.BaseHandler):
    """The built-in model behind the URL scheme demo:, so that it is reached like every other provider."""

    def __init__(self, delay_s: float) -> None:
        self._delay_s = delay_s

    def demo_open(self, request: ScopedRequest) -> DemoResponse:
        """Answers a request by its path."""
        stamp = Stamp(secrets.token_hex(12), int(time.time()))
        try:
            answer = DEMO_PATHS[urllib.parse.urlsplit(request.full_url).path]
            content_type, pieces = answer(request.data or b"", stamp)
            return DemoResponse(200, content_type, pieces, request.scope, self._delay_s)
        except GatewayError as error:
            status, body = CHAT.render_error(error, stamp.request_id)
            return DemoResponse(status, "application/json", [dumps(body).encode("ascii")], request.scope, 0)


class DemoResponse(Response):
    """The built-in model's answer, in pieces at a steady pace."""

    def __init__(self, status: int, content_type: str, pieces: List[bytes], scope: Scope, delay_s: float) -> None:
        self.status = status
        self.headers = {"content-type": content_type}
        self._pieces = pieces
        self._scope = scope
        self._delay_s = delay_s

    def __iter__(self) -> Iterator[bytes]:
        for number, piece in enumerate(self._pieces):
            if number and self._delay_s:
                self._scope.wait(None, self._delay_s)
            yield piece

    def close(self) -> None:
        """There is nothing to close."""


class Transport:
    """The only way out: opens calls, with proxies and CA certificates as the environment says, redirects not followed
    (a key must not travel on), and failures of the network made ours. `keep` idle connections a host are kept; with 0
    no call is ever sent twice."""

    def __init__(self, limits: Limits = Limits(), ca_bundle: Optional[str] = None, demo_delay_s: float = 0.02,
                 proxies: Optional[Dict[str, str]] = None, keep: int = POOL_PER_HOST,
                 connect: Callable[..., socket.socket] = socket.create_connection) -> None:
        self._limits = limits
        self._handler = PooledHandler(limits, ca_bundle, keep, connect)
        self._opener = Opener()
        for handler in (urllib.request.ProxyHandler(proxies), self._handler, DemoHandler(demo_delay_s)):
            self._opener.add_handler(handler)

    def open(self, call: Call, scope: Scope) -> Response:
        """Sends `call`. Raises an `UpstreamError` when no answer comes."""
        request = ScopedRequest(call.url, data=call.body if call.method == "POST" else None,
                                headers=dict(call.headers), method=call.method)
        request.scope = scope
        host = urllib.parse.urlsplit(call.url).netloc.rpartition("@")[2]
        try:
            response = self._opener.open(request, timeout=self._limits.connect_s)
        except (GatewayError, ClientGone, PrivateAddress):
            raise
        except (socket.timeout, TimeoutError):
            scope.check()
            raise UpstreamTimeout(f"no connection to {host} within {self._limits.connect_s:g} seconds") from None
        except (OSError, http.client.HTTPException, ValueError) as error:   # ssl.SSLError is an OSError
            scope.check()
            raise UpstreamError(f"no connection to {host}: {describe(error)}", code="connection_error") from None
        if response is None:
            raise ProviderMisconfigured(f"cannot open {call.url.partition(':')[0]} URLs", code="connection_error")
        return response

    def is_proxied(self, url: str) -> bool:
        """Whether calls to this URL go through a proxy of the environment."""
        split = urllib.parse.urlsplit(url)
        return split.scheme in urllib.request.getproxies() and not urllib.request.proxy_bypass(split.netloc)

    def reap(self) -> None:
        """Closes idle connections that are of no more use."""
        self._handler.pool.reap()

    def close(self) -> None:
        """Closes idle connections; those in use close when they come back."""
        self._handler.pool.close()


# --- Images by address ------------------------------------------------------------------------------------------------
#
# Where a provider wants bytes, the gateway fetches what a client only names. The client may be told to name anything by
# a page that it has read, so nothing is fetched from this machine or its network.

MEDIA_BYTES = 10 * MIB
MEDIA_LIMIT_S = 20.0                # for one of them, redirects included
MEDIA_REDIRECTS = 3
MEDIA_COUNT = 20                    # in one request
_MAGIC = ((b"\x89PNG\r\n\x1a\n", "image/png"), (b"\xff\xd8\xff", "image/jpeg"), (b"GIF8", "image/gif"),
          (b"%PDF-", "application/pdf"))


def media_type_of(data: bytes) -> str:
    """The type of an image or PDF by its first bytes, "" for anything else."""
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        return "image/webp"
    return next((kind for magic, kind in _MAGIC if data.startswith(magic)), "")


def is_public(address: str) -> bool:
    """Whether an IP address is one of the open internet, also where it hides another one inside."""
    try:
        ip = ipaddress.ip_address(address.partition("%")[0])
    except ValueError:
        return False
    if isinstance(ip, ipaddress.IPv6Address):
        inner = ip.ipv4_mapped or ip.sixtofour or (ip.teredo[1] if ip.teredo else None)
        if ip in _NAT64:
            inner = ipaddress.IPv4Address(int(ip) & 0xFFFFFFFF)
        if inner is not None and not is_public(str(inner)):
            return False
    return ip.is_global and not ip.is_multicast


_NAT64 = ipaddress.ip_network("64:ff9b::/96")


def connect_public(address: Tuple[str, int], timeout: Any = None, source_address: Any = None) -> socket.socket:
    """`socket.create_connection`, to public addresses only: the one that was checked is the one that is called."""
    found = socket.getaddrinfo(*address, type=socket.SOCK_STREAM)
    if not all(is_public(str(entry[4][0])) for entry in found):
        raise PrivateAddress
    return socket.create_connection((str(found[0][4][0]), address[1]), timeout, source_address)


class PrivateAddress(OSError):
    """An address of this machine or its network, or none at all."""


class MediaFetcher:
    """Fetches the images and files that a request only names."""

    def __init__(self, ca_bundle: Optional[str] = None) -> None:
        self._transport = Transport(Limits(5.0, 10.0, 10.0), ca_bundle, keep=0, connect=connect_public)

    def fetch(self, part: Union[Image, Document]) -> Union[Image, Document]:
        """The part with its bytes. Raises `BadRequest`."""
        scope = Scope()
        timer = threading.Timer(MEDIA_LIMIT_S, scope.cancel, [UpstreamTimeout("it takes too long")])
        timer.daemon = True
        timer.start()
        url = part.url or ""
        try:
            data, declared = self._follow(url, scope)
        except PrivateAddress:
            raise self._refusal(url, "it is not on the open internet") from None
        except GatewayError as error:
            raise self._refusal(url, error.message) from None
        finally:
            timer.cancel()
        kind = media_type_of(data)
        if isinstance(part, Document) and not kind and declared.startswith("text/"):
            kind = "text/plain"
        if not kind or isinstance(part, Image) != kind.startswith("image/"):
            raise self._refusal(url, "it is no image of a known type" if isinstance(part, Image) else "it is no PDF or text")
        return replace(part, url=None, media_type=kind, data=base64.b64encode(data).decode("ascii"))

    def _follow(self, url: str, scope: Scope) -> Tuple[bytes, str]:
        """(bytes, declared type) behind a URL and its redirects."""
        for _ in range(MEDIA_REDIRECTS + 1):
            split = urllib.parse.urlsplit(url)
            if split.scheme not in ("http", "https") or not split.hostname or split.username is not None:
                raise UpstreamError("that is no address to fetch from")
            if self._transport.is_proxied(url):
                check_public_name(split.hostname)
            response = self._transport.open(Call("GET", url, {"accept": "image/*, application/pdf, text/*;q=0.5",
                                                              "user-agent": USER_AGENT}), scope)
            try:
                if response.status in (301, 302, 303, 307, 308) and response.headers.get("location"):
                    url = urllib.parse.urljoin(url, response.headers["location"])
                    continue
                if response.status != 200:
                    raise UpstreamError(f"the server answered {response.status}")
                if int(response.headers.get("content-length") or 0) > MEDIA_BYTES:
                    raise UpstreamError(f"it has more than {MEDIA_BYTES // MIB} MiB")
                return response.read(MEDIA_BYTES), response.headers.get("content-type", "").lower()
            finally:
                response.close()
        raise UpstreamError("there are too many redirects")

    def _refusal(self, url: str, reason: str) -> BadRequest:
        host = header_text(urllib.parse.urlsplit(url).hostname or "?")[:100]
        return BadRequest(f"the file at {host} cannot be fetched: {reason}; send its bytes instead",
                          code="invalid_image_url", param="messages")


def check_public_name(host: str) -> None:
    """Behind a proxy, which looks names up itself: what this machine can tell. Raises `PrivateAddress`."""
    try:
        found = [str(entry[4][0]) for entry in socket.getaddrinfo(host, None)]
    except OSError:                             # only the proxy knows names here
        found = []
    is_local_name = "." not in host.strip(".") or host.rstrip(".").endswith((".local", ".internal", ".localhost", ".lan"))
    if not all(map(is_public, found)) or (not found and is_local_name):
        raise PrivateAddress


def with_bytes(request: Request, wants: Callable[[Any], bool], fetch: Callable[[Any], Part]) -> Request:
    """`request` with every image or file fetched that is only named and whose bytes are wanted. Raises `BadRequest`."""
    count = 0

    def fill(parts: Iterable[Part]) -> Tuple[Part, ...]:
        nonlocal count
        out: List[Part] = []
        for part in parts:
            if isinstance(part, ToolResult):
                part = replace(part, parts=fill(part.parts))
            elif isinstance(part, (Image, Document)) and part.url and wants(part):
                count += 1
                if count > MEDIA_COUNT:
                    raise BadRequest(f"more than {MEDIA_COUNT} files by address; send their bytes", param="messages")
                part = fetch(part)
            out.append(part)
        return tuple(out)

    messages = tuple(replace(message, parts=fill(message.parts)) for message in request.messages)
    return replace(request, messages=messages) if count else request


# ======================================================================================================================
# §12 Gateway
# ======================================================================================================================

# End-to-end headers of a provider's answer that clients act on.
MAX_CARRIED = 40                  # some clients take a hundred headers at most
CARRIED_TO_CLIENT = re.compile(r"(?:anthropic-ratelimit-.*|x-ratelimit-.*|retry-after(?:-ms)?|openai-processing-ms|"
                               r"openai-version|anthropic-organization-id)")


@dataclass
class Exchange:
    """One client request on its way: what the server knows of it, how to answer it, and what the log will say."""

    client: ClientProtocol
    stamp: Stamp
    headers: Mapping[str, str]
    responder: HttpResponder
    query: str = ""
    size: int = 0                               # of the body, in bytes
    is_last: bool = True                        # no other model stands behind this one
    account: str = ""                           # which one was called, as a hash
    answer_headers: Dict[str, str] = field(default_factory=dict)
    log: Dict[str, Any] = field(default_factory=dict)
    body: Optional[bytes] = None                # the request's, where conversations are logged
    asked: str = ""                             # the model by the client's name
    usage: Usage = Usage()
    secrets: set[str] = field(default_factory=set)      # what no log may show


@dataclass
class Attempt:
    """One request's tries at one model: what is tried next, and which remedies are left."""

    lane: Lane
    credential: Credential
    scope: Scope
    exchange: Exchange
    retries: int
    call: Call = Call("", "", {})
    waits: int = 0
    may_renew: bool = True
    may_leave_out: bool = True
    started: float = field(default_factory=time.monotonic)


def retry_pause(error: GatewayError, number: int, passed_s: float, chance: float) -> Optional[float]:
    """Seconds to wait before a failed request is sent again; None when that makes no sense, or takes too long. `number`
    tries have been made in `passed_s` seconds; `chance` from 0 to 1 spreads those who wait for the same thing."""
    if not isinstance(error, (UpstreamError, Conflict)) or error.retryable is False:
        return None
    pause_s = min(RETRY_FIRST_S * 2 ** number, RETRY_MOST_S) * (1 - chance / 4)
    if error.retry_after is not None:
        pause_s = max(error.retry_after, 0.0)
    return pause_s if passed_s + pause_s <= RETRY_BUDGET_S else None


# Why the next model of a chain has its turn; the first that fits.
FALLBACK_REASONS: Tuple[Tuple[Type[GatewayError], str], ...] = (
    (QuotaExceeded, "out_of_quota"), (RateLimited, "rate_limited"), (ContextOverflow, "too_long"),
    (CredentialRefused, "credential_refused"), (Unauthorized, "no_credentials"), (NotSupported, "not_supported"),
    (ModelNotFound, "no_such_model"),
    (Overloaded, "overloaded"), (UpstreamError, "down"), (Forbidden, "forbidden"))


def fallback_reason(error: GatewayError) -> str:
    """Why another model may succeed where this error came, "" when none would."""
    return next((reason for kind, reason in FALLBACK_REASONS if isinstance(error, kind)), "")


class Quirks:
    """Parameters that models turned out not to take, kept in a file: model → parameter → what goes in its place, ""
    for nothing."""

    def __init__(self, path: Optional[str]) -> None:
        self.path = path
        self._file = FileCache(path) if path else None
        self._lock = threading.Lock()
        self._known: Dict[str, Dict[str, str]] = {}     # where there is no file, or it cannot be written

    def all(self) -> Dict[str, Dict[str, str]]:
        """All that is known."""
        stored = {model: as_dict(names) for model, names in self._file.read().items()} if self._file else {}
        return {**stored, **self._known}

    def of(self, model_id: str) -> Dict[str, str]:
        """What is known of one model."""
        return self.all().get(model_id, {})

    def note(self, model_id: str, name: str, replacement: str) -> None:
        """Remembers one more."""
        with self._lock:
            known = self.all()
            known[model_id] = {**known.get(model_id, {}), name: replacement}
            try:
                if not self.path:
                    raise OSError("nowhere to write to")
                write_private_file(self.path, render_auth(known))
                self._known = {}
            except OSError:
                self._known = known

    def reset(self) -> None:
        """Forgets everything. Raises OSError."""
        with contextlib.suppress(FileNotFoundError):
            os.unlink(self.path or "")


# Without these a request is another one.
KEPT_PARAMETERS = frozenset({"model", "messages", "input", "contents", "request", "stream", "system", "instructions",
                             "tools", "response_format", "text", "output_config", "prompt", "suffix", "echo", "content",
                             "requests", "dimensions", "output_dimension", "outputDimensionality"})
_UNSUPPORTED = tuple(re.compile(pattern, re.IGNORECASE) for pattern in (
    r"(?:unsupported|unknown|unrecognized|invalid) (?:parameter|argument|field|value)s?:? ['\"`]?([a-z_][\w.]*)",
    r"unrecognized request arguments? supplied: ['\"`]?([a-z_][\w.]*)",
    r"^['\"`]?([a-z_][\w.]*)['\"`]?:? (?:extra inputs are not permitted|is not supported|is deprecated for this model)",
    r"property ['\"`]([a-z_][\w.]*)['\"`] is unsupported",
    r"['\"`]([a-z_][\w.]*)['\"`] (?:is not supported|is unsupported|does not support|is not allowed)",
    r"does not support (?:the )?(?:parameter )?['\"`]([a-z_][\w.]*)['\"`]"))
_REPLACEMENT = re.compile(r"use ['\"`]([a-z_]\w*)['\"`] instead", re.IGNORECASE)


def unsupported_parameter(error: GatewayError, body: bytes) -> Tuple[str, str]:
    """(the top-level parameter that a provider's 400 will not take, what it wants instead), "" for none."""
    if error.status not in (400, 422) or isinstance(error, ContextOverflow):
        return "", ""
    try:
        inner = as_dict(as_dict(json.loads(body)).get("error"))
    except (ValueError, RecursionError):
        inner = {}
    code, param = inner.get("code"), inner.get("param")
    name = param if isinstance(param, str) and code in ("unsupported_parameter", "unsupported_value", "unknown_parameter") else ""
    if not name:
        found = next((match for match in (pattern.search(error.message) for pattern in _UNSUPPORTED) if match), None)
        name = found.group(1) if found else ""
    other = _REPLACEMENT.search(error.message)
    return (name, other.group(1) if other else "") if re.fullmatch(r"[a-z]\w*", name, re.IGNORECASE) else ("", "")


def without_parameters(body: bytes, quirks: Mapping[str, str]) -> Tuple[bytes, List[str]]:
    """A request body without what the model does not take, and the names that went and have nothing in their place."""
    if not quirks:
        return body, []
    data = loads(body.decode("utf-8-sig"))
    gone = []
    for name in [name for name in quirks if name in data]:
        value = data.pop(name)
        if quirks[name]:
            data.setdefault(quirks[name], value)
        else:
            gone.append(name)
    return dumps(data).encode("ascii"), gone


class Gateway:
    """Serves requests: finds model and credential, picks the lane, calls the provider, carries the answer back."""

    def __init__(self, config: Config, catalogue: Catalogue, credentials: Credentials, transport: Transport,
                 clock: Callable[[], float] = time.time, quirks: Optional[Quirks] = None,
                 journal: Optional[Journal] = None) -> None:
        self.config = config
        self.catalogue = catalogue
        self.credentials = credentials
        self.transport = transport
        self.clock = clock
        self.signatures = SignatureMemory()
        self.quirks = quirks or Quirks(None)
        self.journal = journal or Journal(LogSettings())
        self.media = MediaFetcher(config.ca_bundle)
        self.meter = TokenMeter(secrets.token_bytes(16))
        self.uncounted: set[str] = set()        # models of hosts that speak Anthropic's protocol but do not count
        self.cooling = Memory()                 # models that failed not long ago
        self.load: Any = [0]                    # requests under way at providers, by worker process
        self.worker = 0
        self.owner_pid = 0                      # the process that the lock file names, when that is not this one
        self._scopes: set[Scope] = set()
        self._scopes_lock = threading.Lock()

    def is_usable(self, provider: Provider) -> bool:
        """Whether the provider has a credential that may be used on this address."""
        return self._takes_passed(provider) or self.credentials.usable(provider) and not self._is_hidden(provider)

    def _is_hidden(self, provider: Provider) -> bool:
        return not self.config.exposes_subscriptions and self.credentials.is_subscription(provider)

    def models(self) -> List[Model]:
        """The models that clients may use, by id; from memory."""
        return self.catalogue.listing(self.is_usable)

    def complete(self, exchange: Exchange, body: bytes) -> None:
        """Answers a completion request. Raises `GatewayError` while nothing has been sent, or `ClientGone`."""
        data = self._with_model(parse_json_object(body))
        request = replace(exchange.client.parse(data), body=body, headers=exchange.headers, query=exchange.query,
                          session=session_of(exchange.headers, data))
        exchange.log["stream"], exchange.asked = request.stream, request.model
        candidates = self._candidates(request)
        if len(candidates) == 1:
            self._complete_on(candidates[0], request, exchange)
            return
        # what a client brought for one provider is not shown to the next
        passed = [model for model in candidates if self._takes_passed(self.catalogue.providers[model.provider])]
        candidates = [model for model in candidates if model not in passed[1:]]
        now = self.clock()
        candidates.sort(key=lambda model: self._rests(model, now))      # stable: in their order otherwise
        for model in candidates:
            exchange.is_last = model is candidates[-1]
            headers = dict(exchange.answer_headers)
            try:
                return self._complete_on(model, request, exchange)
            except GatewayError as error:
                reason = fallback_reason(error)
                if exchange.is_last or exchange.responder.has_begun or not reason or (
                        model in passed and isinstance(error, Unauthorized)):
                    raise
                exchange.answer_headers = headers
                self._fall_back(model, reason, error, exchange)

    def _fall_back(self, model: Model, reason: str, error: GatewayError, exchange: Exchange) -> None:
        """Notes why the next model of a chain has its turn, and lets this one rest."""
        exchange.log.setdefault("fallbacks", []).append({"model": model.full_id, "reason": reason})
        exchange.answer_headers["x-pigateway-fallback"] = header_text(", ".join(
            f"{passed['model']}: {passed['reason']}" for passed in exchange.log["fallbacks"]))
        if reason not in ("too_long", "not_supported"):     # that is the request's fault, not the model's
            rest_s = min(max(error.retry_after or 0.0, COOL_DOWN_S), 3600.0)
            self.cooling.put(model.full_id, exchange.account, self.clock() + rest_s - self.cooling.ttl_s)

    def _rests(self, model: Model, now: float) -> bool:
        """Whether a model failed not long ago, with the account that it would be called with now."""
        account = self.cooling.get(model.full_id, now)
        if account is None:
            return False
        try:
            return account == self.credentials.get(self.catalogue.providers[model.provider], model).account
        except GatewayError:
            return True

    def _complete_on(self, model: Model, request: Request, exchange: Exchange) -> None:
        """Answers a completion request with this model."""
        model, credential = self._authorise(model, exchange)
        if model.level:
            request = replace(request, reasoning=Reasoning(model.level))
        if credential.is_passed:
            request = passed_request(request, self.config.api_key)
        if request.images and model.input is not None and "image" not in model.input:
            refuse([(request.images[0], f"{model.full_id} does not take images")])
        request = self._own_seals(request, origin_of(model, credential))
        upstream = UPSTREAM_PROTOCOLS[model.protocol]
        if (exchange.client.name, upstream.name) not in NATIVE_LANES:
            request = with_bytes(request, lambda part: upstream.needs_bytes(part, model), self.media.fetch)
        lane = choose_lane(exchange.client, upstream, request)(exchange.client, upstream, request, model, exchange.stamp)
        self._run(lane, credential, exchange)

    def _own_seals(self, request: Request, origin: str) -> Request:
        """The request with the signatures of this model and account: those that its client dropped put back, those of
        others taken off."""
        now, memory = self.clock(), self.signatures
        request = with_remembered(request, memory, now)

        def is_foreign(signature: str, known: str) -> bool:
            return known != origin if known else memory.is_foreign(signature, origin, now)

        return without_seals(request, is_foreign)

    def count_tokens(self, exchange: Exchange, body: bytes) -> None:
        """Answers Anthropic's count_tokens: from the provider where it has that, else with an estimate."""
        data = self._with_model(parse_json_object(body))
        request = replace(MESSAGES.parse_prompt(data), body=body, headers=exchange.headers, query=exchange.query,
                          stream=False)
        model, credential = self._resolve(request, exchange)
        if credential.is_passed:
            request = passed_request(request, self.config.api_key)
        request = self._own_seals(request, origin_of(model, credential))
        if model.protocol == AnthropicMessages.name:
            lane = CountLane(exchange.client, UPSTREAM_PROTOCOLS[model.protocol], request, model, exchange.stamp)
            try:
                self._run(lane, credential, exchange)
                return
            except (ModelNotFound, UpstreamError):
                exchange.log.pop("error", None)     # a host that speaks Messages need not count
                self.uncounted.add(model.full_id)
        self._send_count(model, exchange, {"input_tokens": self.meter.estimate(model.full_id, request)})

    def count_input(self, exchange: Exchange, body: bytes) -> None:
        """Answers OpenAI's input_tokens with an estimate."""
        request = replace(RESPONSES.parse_prompt(self._with_model(parse_json_object(body))), headers=exchange.headers,
                          stream=False)
        model, _ = self._resolve(request, exchange)
        self._send_count(model, exchange, {"object": "response.input_tokens",
                                           "input_tokens": self.meter.estimate(model.full_id, request)})

    def _send_count(self, model: Model, exchange: Exchange, answer: Dict[str, Any]) -> None:
        exchange.log["lane"] = TranslatedLane.name
        headers = {"content-type": "application/json", "x-pigateway-lane": TranslatedLane.name,
                   "x-pigateway-model": header_text(model.full_id)}
        exchange.responder.send(200, headers, dumps(answer).encode("ascii"))

    def _resolve(self, request: Request, exchange: Exchange) -> Tuple[Model, Credential]:
        """The first model that a client's name means, and what it is called with."""
        exchange.log["stream"] = request.stream
        return self._authorise(self._candidates(request)[0], exchange)

    def _with_model(self, data: Dict[str, Any]) -> Dict[str, Any]:
        """A body that names no model, with the default one, if there is one."""
        if data.get("model") not in (None, ""):
            return data
        name = self.config.routing.routes("")[0].model
        return {**data, "model": name} if name else data

    def _candidates(self, request: Request) -> List[Model]:
        """The models that a request's name means, in the order in which they are tried, each with the level of thinking
        that the model map gives it. Raises `ModelNotFound`."""
        level = request.reasoning.level if request.reasoning else None
        models = []
        for route in self.config.routing.routes(request.model):
            model = self.catalogue.resolve(self.target_name(route.model), self.is_usable)
            mapped = map_effort(route.effort, level)
            models.append(replace(model, level=mapped) if mapped else model)
        return models

    def target_name(self, name: str) -> str:
        """A model's name, with the provider that is in charge where it names none."""
        if name.startswith(CLAUDE_ALIAS) and "--" in name:
            return name[len(CLAUDE_ALIAS):].replace("--", "/", 1)
        provider = self.catalogue.providers.get(self.config.provider)
        if provider is None or name == DEMO:
            return name
        is_own = name in self.catalogue.models_of(provider)
        return name if not is_own and name.partition("/")[0] in self.catalogue.providers and "/" in name else (
            f"{provider.name}/{name}")

    def listed(self, for_claude: bool) -> List[Model]:
        """What GET /v1/models lists: the models, the names that the model map adds, and for a client that only looks at
        names with "claude" such a name for each of the others."""
        models = {model.full_id: model for model in self.models()}
        models.update((alias, self._aliased(alias)) for alias in self._aliases() if alias not in models)
        if for_claude:
            named = [f"{CLAUDE_ALIAS}{model.provider}--{model.id}" for name, model in models.items() if "claude" not in name]
            models.update((alias, self._aliased(alias)) for alias in named)
        return [models[name] for name in sorted(models)]

    def _aliased(self, name: str) -> Model:
        first = self.config.routing.routes(name)[0].model
        return replace(self.catalogue.resolve(self.target_name(first), self.is_usable), alias=name)

    def _aliases(self) -> List[str]:
        """The names that the model map knows and that lead to a model which can be used."""
        found = []
        for name in [*self.config.routing.aliases(), *self.config.routing.targets()]:
            with contextlib.suppress(ModelNotFound):
                if self.is_usable(self.catalogue.providers[self._aliased(name).provider]):
                    found.append(name)
        return found

    def _authorise(self, model: Model, exchange: Exchange) -> Tuple[Model, Credential]:
        provider = self.catalogue.providers[model.provider]
        exchange.log["model"] = model.full_id
        if self._takes_passed(provider):
            credential = passed_credential(exchange, provider, model, self.config.api_key)
            configured = {name: value for name, value in self.credentials.headers(provider, model).items()
                          if name.lower() not in KEY_HEADERS}
            credential = replace(credential, headers={**configured, **credential.headers})
        else:
            self._check_exposure(provider, self._is_hidden(provider))
            credential = self.credentials.get(provider, model)
            self._check_exposure(provider, credential.kind == "oauth" and not self.config.exposes_subscriptions)
        exchange.account = credential.account
        base_url = credential.parts.get("endpoint") or self.credentials.fill(model.base_url, provider)
        return replace(model, base_url=base_url, headers={}), credential

    def _takes_passed(self, provider: Provider) -> bool:
        return provider.name in self.config.pass_through

    def _check_exposure(self, provider: Provider, is_hidden: bool) -> None:
        if is_hidden:
            raise Forbidden(f'"{provider.name}" is a personal subscription and not offered on this address '
                            "(--expose-oauth-subscriptions)", code="subscription_exposure_disabled", param="model")

    def _run(self, lane: Lane, credential: Credential, exchange: Exchange) -> None:
        scope = exchange.responder.scope()
        self._track(scope, True)
        try:
            self._attempts(lane, credential, scope, exchange)
        finally:
            self._track(scope, False)

    def _track(self, scope: Scope, is_open: bool) -> None:
        with self._scopes_lock:
            (self._scopes.add if is_open else self._scopes.discard)(scope)
            self.load[self.worker] = len(self._scopes)

    def _attempts(self, lane: Lane, credential: Credential, scope: Scope, exchange: Exchange) -> None:
        """Sends the request, and sends it again as long as the client has not heard a thing and a remedy is left."""
        headers = dict(exchange.answer_headers)
        attempt = Attempt(lane, credential, scope, exchange, self.config.retries if exchange.is_last else 0)
        while True:
            attempt.call = self._prepare(attempt.lane, attempt.credential, exchange)
            try:
                return self._call_provider(attempt.lane, attempt.call, scope, exchange)
            except GatewayError as error:
                error.hide(attempt.lane.secrets)
                if exchange.responder.has_begun:
                    return self._end_with(error, attempt.lane, exchange)
                remedy = next((remedy for remedy in self._remedies if remedy(self, error, attempt)), None)
                if remedy is None:
                    raise
                exchange.answer_headers = dict(headers)

    def _end_with(self, error: GatewayError, lane: Lane, exchange: Exchange) -> None:
        """Ends a stream of which the client has had nothing but signs of life: the lane knows how such a one begins."""
        exchange.log["error"] = redact(error.message)
        exchange.responder.write(lane.fail(error))
        exchange.responder.finish(False)

    def _renew_token(self, error: GatewayError, attempt: Attempt) -> bool:
        """A token that the provider refused is renewed, once."""
        credential = attempt.credential
        if not isinstance(error, CredentialRefused) or credential.kind != "oauth":
            return False
        if not attempt.may_renew:
            error.message += f" ({log_in_advice(attempt.lane.model.provider)}, if that stays)"
            return False
        attempt.may_renew = False
        logins, name = self.credentials.log_in_of(self.catalogue.providers[attempt.lane.model.provider])
        if credential.is_passed or not logins.replace_refused(name, credential.token):
            return False
        attempt.lane.model, attempt.credential = self._authorise(
            self.catalogue.resolve(attempt.lane.model.full_id, self.is_usable), attempt.exchange)
        attempt.lane = attempt.lane.again()
        return True

    def _leave_out_thinking(self, error: GatewayError, attempt: Attempt) -> bool:
        """Earlier thinking whose signature the provider will not take goes, once."""
        if not (isinstance(error, BadRequest) and _SEAL_WORDS.search(error.message)):
            return False
        request = without_seals(attempt.lane.request, lambda signature, origin: True)
        if request.foreign == attempt.lane.request.foreign:
            return False                        # there is none left
        log.info("%s refused a signature; sending the request without earlier thinking", attempt.lane.model.full_id)
        attempt.lane = attempt.lane.again(request=request)
        return True

    def _leave_out_parameter(self, error: GatewayError, attempt: Attempt) -> bool:
        """A parameter that the provider does not know is remembered and left out, once; not where all must count."""
        name = error.unsupported
        if not name or not attempt.may_leave_out or self._is_strict(attempt.exchange):
            return False
        attempt.may_leave_out = False
        data = loads(attempt.call.body.decode("utf-8"))
        if name in KEPT_PARAMETERS or name not in data:
            return False
        replacement = error.replacement if error.replacement not in data else ""
        log.info("%s does not take %s; %s from now on", attempt.lane.model.full_id, name,
                 f"sending {replacement} instead" if replacement else "leaving it out")
        self.quirks.note(attempt.lane.model.full_id, name, replacement)
        attempt.lane = attempt.lane.again()
        return True

    def _translate(self, error: GatewayError, attempt: Attempt) -> bool:
        """A host or model without legacy Completions is asked in the way that it has."""
        is_missing = isinstance(error, ModelNotFound) or error.code == "OperationNotSupported"      # at Azure
        if not isinstance(attempt.lane, TextLane) or not is_missing or attempt.lane.request.refused:
            return False
        attempt.lane = attempt.lane.again(TranslatedLane)
        return True

    def _wait(self, error: GatewayError, attempt: Attempt) -> bool:
        """A passing fault is waited out, within the budget."""
        pause_s = retry_pause(error, attempt.waits, time.monotonic() - attempt.started, secrets.randbelow(1000) / 1000)
        if pause_s is None or attempt.waits >= attempt.retries:
            return False
        attempt.waits += 1
        attempt.exchange.log["retries"] = attempt.waits
        attempt.scope.put_off_beat()            # a sign of life would begin the answer, and then it is too late
        attempt.scope.wait(None, pause_s)
        attempt.lane = attempt.lane.again()
        return True

    _remedies: Tuple[Callable[[Any, GatewayError, Attempt], bool], ...] = (
        _renew_token, _leave_out_thinking, _leave_out_parameter, _translate, _wait)

    def _is_strict(self, exchange: Exchange) -> bool:
        return self.config.strict or exchange.headers.get("x-pigateway-strict") in ("1", "true")

    def _prepare(self, lane: Lane, credential: Credential, exchange: Exchange) -> Call:
        """The call for the lane's request, and what the answer's headers say of it."""
        lane.secrets = list(dict.fromkeys([*lane.secrets, *credential.secrets]))
        exchange.secrets.update(lane.secrets)
        lane.origin = origin_of(lane.model, credential)
        lane.is_passed = credential.is_passed
        call, dropped = lane.call(credential)
        call = call._replace(headers={**call.headers, **request_headers(lane.request, lane.model)})
        body, quirks = without_parameters(call.body, self.quirks.of(lane.model.full_id))
        dropped += [name for name in quirks if name not in dropped]
        call = lane.upstream.sign(call._replace(body=body), credential, self.clock())
        dropped = list(dict.fromkeys(dropped))
        if dropped and self._is_strict(exchange):
            raise BadRequest(f"{lane.model.full_id} does not take: {', '.join(dropped)}", code="unsupported_parameter",
                             param=dropped[0])
        exchange.answer_headers.update({"x-pigateway-lane": lane.name, "x-pigateway-model": header_text(lane.model.full_id)})
        if dropped:
            exchange.answer_headers["x-pigateway-dropped"] = header_text(", ".join(dropped))
        asked = lane.request.reasoning
        if asked and lane.model.reasoning and fit_level(asked.level, lane.model) != asked.level:
            exchange.answer_headers["x-pigateway-effort"] = fit_level(asked.level, lane.model) or "model default"
        return call

    def _call_provider(self, lane: Lane, call: Call, scope: Scope, exchange: Exchange) -> None:
        exchange.log["lane"] = lane.name
        if lane.request.stream:
            scope.on_beat = functools.partial(self._beat, exchange)
        response = self.transport.open(call, scope)
        try:
            carried = [(name, header_text(redact(value, lane.secrets))) for name, value in response.headers.items()
                       if CARRIED_TO_CLIENT.fullmatch(name)]
            exchange.answer_headers.update(carried[:MAX_CARRIED])
            if not 200 <= response.status < 300:
                raise self._refusal(lane, response)
            is_stream = lane.upstream.stream_type in response.headers.get("content-type", "")
            if isinstance(lane, NativeLane) and is_stream != lane.request.stream:
                # the provider chose the other form: only the representation can turn one into the other
                lane = lane.again(TranslatedLane)
                exchange.answer_headers["x-pigateway-lane"] = lane.name
            self._carry(lane, response, is_stream, exchange)
        finally:
            exchange.usage = lane.usage
            exchange.log.update(lane=lane.name, tokens_in=lane.usage.prompt, tokens_out=lane.usage.output,
                                stop=redact(str(lane.stop_reason), lane.secrets)[:64])
            response.close()
        self._observe(lane)

    def _observe(self, lane: Lane) -> None:
        """Learns from an answer that has been sent how its model counts, unless its provider can be asked."""
        model_id = lane.model.full_id
        if lane.error is None and (lane.model.protocol != AnthropicMessages.name or model_id in self.uncounted):
            self.meter.observe(model_id, lane.request, lane.usage.prompt)

    def _refusal(self, lane: Lane, response: Response) -> GatewayError:
        if 300 <= response.status < 400:
            return ProviderMisconfigured(f"the provider answered with a redirect ({response.status}), which is never "
                                         "followed; check its base URL")
        body = redact_body(response.read(MAX_EVENT_BYTES), lane.secrets)[:MAX_ERROR_BYTES]
        error = lane.upstream.parse_error(response.status, response.headers, body, self.clock())
        if lane.is_passed and response.status == 401:       # the client's own: it has to hear that, and can help itself
            reply = ProviderReply(401, response.headers.get("content-type", "application/json"), body)
            error = Unauthorized(error.message, provider_reply=reply)
        error.unsupported, error.replacement = unsupported_parameter(error, body)
        if response.headers.get("x-should-retry") == "false":
            error.retryable = False
        if error.provider_reply and isinstance(lane, NativeLane):
            error.provider_reply = error.provider_reply._replace(
                content_type=redact(error.provider_reply.content_type, lane.secrets))
        else:
            error.provider_reply = None
        return error

    def _beat(self, exchange: Exchange) -> None:
        """The provider is silent: the client hears that the connection lives, and its status line need not wait longer."""
        self._begin(exchange)
        exchange.responder.write(exchange.client.heartbeat)

    def _begin(self, exchange: Exchange) -> None:
        if not exchange.responder.has_begun:
            exchange.responder.begin(200, {**exchange.answer_headers, **STREAM_HEADERS})

    def _carry(self, lane: Lane, response: Response, is_stream: bool, exchange: Exchange) -> None:
        """Brings the answer to the client, streamed as it comes or whole at its end."""
        held = b""
        for out in self._outputs(lane, response, is_stream):
            held += out
            self._remember(lane)
            if lane.error and not exchange.responder.has_begun and not lane.started:
                raise lane.error                # nothing was shown yet: it can still be an HTTP status
            if lane.request.stream and held and (lane.started or exchange.responder.has_begun):
                self._begin(exchange)
                exchange.responder.write(held)
                held = b""
            if lane.finished:
                break
        if lane.error:
            if not lane.request.stream:
                raise lane.error
            exchange.log["error"] = redact(lane.error.message)
        if lane.request.stream:
            exchange.responder.finish(lane.error is None)
        else:
            exchange.responder.send(200, {**exchange.answer_headers, "content-type": "application/json"}, held)

    def _remember(self, lane: Lane) -> None:
        """Keeps the seals of calls before the client sees the calls: it may answer them at once."""
        while lane.signed_calls:
            call = lane.signed_calls.pop()
            self.signatures.remember(call.id, call.maker, call.signature or "", self.clock(), lane.origin)
        while lane.issued:
            self.signatures.note_origin(lane.issued.pop(), lane.origin, self.clock())

    def _outputs(self, lane: Lane, response: Response, is_stream: bool) -> Iterator[bytes]:
        try:
            if not is_stream:
                yield lane.whole(response.read(lane.limit_bytes))
                return
            size, heard, heard_at = 0, 0, time.monotonic()
            for data in response:
                size += len(data)
                if size > MAX_EVENT_BYTES and not lane.request.stream:
                    raise UpstreamProtocolError(f"the provider's answer is longer than {MAX_EVENT_BYTES} bytes")
                yield lane.feed(data)
                now = time.monotonic()
                if lane.heard != heard:
                    heard, heard_at = lane.heard, now
                elif now - heard_at > self._silence_s(lane):     # signs of life alone: nobody is at work there
                    raise UpstreamTimeout("the provider only sends signs of life and no answer")
            yield lane.end()
        except GatewayError as error:
            yield lane.fail(error)

    def _silence_s(self, lane: Lane) -> float:
        return (self.config.idle_timeout_ms if lane.started else self.config.first_byte_timeout_ms) / 1000

    def stop(self, error: GatewayError) -> None:
        """Ends the open requests; each client is told."""
        with self._scopes_lock:
            scopes = list(self._scopes)
        for scope in scopes:
            scope.cancel(error)

    @property
    def open_requests(self) -> int:
        """How many requests are under way at providers."""
        with self._scopes_lock:
            return len(self._scopes)


# What providers write when they will not take earlier reasoning back.
_SEAL_WORDS = re.compile(r"signature|encrypted[_ ]content", re.IGNORECASE)


KEY_HEADERS = ("authorization", "x-api-key", "x-goog-api-key", "api-key", "x-auth-token", "proxy-authorization")


def passed_request(request: Request, own_key: Optional[str]) -> Request:
    """A request whose client brought its own credential, without what is meant for this gateway: its key, wherever it
    stands, and the headers of the connection."""
    hop = {name.strip().lower() for name in request.headers.get("connection", "").split(",")}
    headers = {name: value for name, value in request.headers.items()
               if name not in hop and not NOT_PASSED.fullmatch(name) and not (own_key and own_key in value)}
    has_key = own_key and own_key in urllib.parse.unquote_plus(request.query)
    return replace(request, headers=headers, query="" if has_key else request.query)


def passed_credential(exchange: Exchange, provider: Provider, model: Model, own_key: Optional[str]) -> Credential:
    """The credential that the client itself brought for the provider: any that is not the key of this gateway. Raises
    `Unauthorized`."""
    for name in ("authorization", "x-api-key", "x-goog-api-key"):
        value = exchange.headers.get(name, "")
        scheme, _, bearer = value.partition(" ")
        token = value if name != "authorization" else bearer.strip() if scheme.lower() == "bearer" else ""
        if not token or (own_key and hmac.compare_digest(token.encode("utf-8"), own_key.encode("utf-8"))):
            continue
        if exchange.client is MESSAGES and model.protocol == AnthropicMessages.name:
            return Credential("client", token, {name: value}, is_passed=True)
        return Credential("oauth" if OAUTH_MARK in token else "api_key", token, is_passed=True)
    raise Unauthorized(f'"{provider.name}" is called with the client\'s own key or token, and there is none in the request',
                       code="no_credentials", param="model")


STREAM_HEADERS = {"content-type": "text/event-stream; charset=utf-8", "cache-control": "no-cache, no-transform",
                  "x-accel-buffering": "no"}


def session_of(headers: Mapping[str, str], data: Mapping[str, Any]) -> str:
    """What the client calls its conversation, "" when it does not say."""
    names = (data.get("prompt_cache_key"), headers.get("x-session-id"), headers.get("x-claude-code-session-id"))
    return next((name for name in names if isinstance(name, str) and name), "")


def header_text(text: str) -> str:
    """`text` as a header value: printable ASCII, at most 1000 characters."""
    return re.sub(r"[^\x20-\x7e]", "?", text)[:1000]


Fetch = Callable[[Call], Dict[str, Any]]


class Discovery:
    """Asks the servers that have no built-in list for theirs, in the background; requests never wait for it."""

    def __init__(self, gateway: Gateway) -> None:
        self._gateway = gateway
        self._stopped = False
        self._wake = threading.Event()
        self._thread: Optional[threading.Thread] = None
        self._asking: set[str] = set()          # a server that drips its list is not asked again meanwhile

    def start(self) -> None:
        """Starts the thread, if there is anybody to ask."""
        if any(provider.discover for provider in self._gateway.catalogue.providers.values()):
            self._thread = threading.Thread(target=self._loop, name="discovery", daemon=True)
            self._thread.start()

    def stop(self) -> None:
        """Ends the thread."""
        self._stopped = True
        self._wake.set()

    def ask_again(self) -> None:
        """Asks everybody now."""
        if self._thread is None:
            self.start()
        self._wake.set()

    def _loop(self) -> None:
        while not self._stopped:
            complete = self.run()
            self._wake.wait(DISCOVERY_S if complete else DISCOVERY_RETRY_S)
            self._wake.clear()

    def run(self) -> bool:
        """Asks everybody once, side by side; whether all of them answered."""
        gateway = self._gateway
        asked = [provider for provider in gateway.catalogue.providers.values()
                 if provider.discover and gateway.is_usable(provider) and provider.name not in self._asking
                 and provider.name not in gateway.config.pass_through]
        results: List[bool] = []
        scopes = [Scope() for _ in asked]
        threads = [threading.Thread(target=lambda p=provider, s=scope: results.append(self.ask(p, s)), daemon=True)
                   for provider, scope in zip(asked, scopes)]
        for thread in threads:
            thread.start()
        deadline = time.monotonic() + DISCOVERY_TIMEOUT_S
        for thread in threads:
            thread.join(max(0.0, deadline - time.monotonic()))
        for scope in scopes:
            scope.cancel(UpstreamTimeout("no model list in time"))
        return len(results) == len(asked) and all(results)

    def ask(self, provider: Provider, scope: Scope) -> bool:
        """Takes over one server's list; False when it gave none."""
        gateway = self._gateway
        self._asking.add(provider.name)
        try:
            model = unlisted_model(provider, "")
            credential = gateway.credentials.get(provider, model)
            base_url = credential.parts.get("endpoint") or gateway.credentials.fill(model.base_url, provider)
            model = replace(model, base_url=base_url, headers={})
            get = functools.partial(self._get, model, credential, scope)
            found = self.listers.get(provider.source, Discovery._list)(self, provider, model, credential, get)
        except (GatewayError, AttributeError, KeyError, TypeError) as error:
            log.debug("no model list from %s: %s", provider.name, redact(str(error)))
            return False
        finally:
            self._asking.discard(provider.name)
        if found:
            gateway.catalogue.discover(provider, found, provider.source == "copilot")
        return bool(found)

    def _get(self, model: Model, credential: Credential, scope: Scope, call: Call) -> Dict[str, Any]:
        gateway = self._gateway
        call = UPSTREAM_PROTOCOLS[model.protocol].sign(call, credential, gateway.clock())
        response = gateway.transport.open(call, scope)
        try:
            body = response.read(MAX_EVENT_BYTES)
        finally:
            response.close()
        if response.status != 200:
            raise UpstreamError(f"the provider answered {response.status}")
        return parse_answer(body)

    def _list(self, provider: Provider, model: Model, credential: Credential, get: Fetch) -> Dict[str, Model]:
        path, headers = "/models", authorization(model, credential, provider.auth or "bearer")
        if provider.protocol == AnthropicMessages.name:
            path, headers = "/v1/models", UPSTREAM_PROTOCOLS[provider.protocol].headers(model, credential, {})
        call = Call("GET", join_url(model.base_url, path), headers)
        return read_model_list(get(call), provider)

    def _list_copilot(self, provider: Provider, model: Model, credential: Credential, get: Fetch) -> Dict[str, Model]:
        headers = {**authorization(model, credential), "x-github-api-version": COPILOT_API_VERSION}
        body = get(Call("GET", join_url(model.base_url, "/models"), headers))
        return read_copilot_models(body, provider, self._gateway.catalogue.models_of(provider))

    def _list_bedrock(self, provider: Provider, model: Model, credential: Credential, get: Fetch) -> Dict[str, Model]:
        foundation = get(bedrock_list_call("foundation-models", model, credential))
        profiles: List[Any] = []
        token = ""
        for _ in range(BEDROCK_PAGES):
            page = get(bedrock_list_call("inference-profiles", model, credential, token))
            profiles.extend(page.get("inferenceProfileSummaries") or ())
            token = page.get("nextToken") or ""
            if not token:
                break
        return read_bedrock_models(foundation, {"inferenceProfileSummaries": profiles}, provider)

    listers: Mapping[str, Callable[..., Dict[str, Model]]] = {"copilot": _list_copilot, "aws": _list_bedrock}


# --- The log files ----------------------------------------------------------------------------------------------------
#
# Off unless asked for. A request's thread only leaves references in a bounded queue; one thread of the process makes
# records of them, takes the secrets out and writes. Whatever the disk does, no answer waits for it.

SERVER_LOG, CONVERSATION_LOG = "server.log.jsonl", "conversation.log.jsonl"
LogLines = List[Tuple[str, Dict[str, Any]]]     # (file, record)


class LogSettings(NamedTuple):
    """What goes to the log files, where they are and how large they and the queue get."""

    enabled: bool = False
    server: bool = True
    conversation: bool = True
    dir: str = ""
    max_queue_size: int = 5000
    max_file_bytes: int = 50 * MIB


class LogEntry(NamedTuple):
    """What waits to be logged: how many lines it becomes, how many bytes it keeps in memory, what makes the lines."""

    lines: int
    size: int
    make: Callable[[], LogLines]
    is_last: bool = False                       # has room always, and is not left out when time is short


class Capture:
    """The beginning of an answer, as references to what was sent."""

    def __init__(self) -> None:
        self.pieces: List[bytes] = []
        self.size = 0

    def add(self, data: bytes) -> None:
        """Takes what is sent next."""
        if self.size < LOGGED_BYTES:
            self.pieces.append(data[:LOGGED_BYTES - self.size])
        self.size += len(data)


class Journal:
    """The queue of the log files and the thread that writes them. Several processes may have the same files."""

    PAUSE_S = 0.05                              # what comes within goes out in one write
    YIELD_S = 0.0002                            # after each entry: who answers should not wait for a turn to compute
    STOP_S, LATE_S = 0.9, 0.5                   # the wait for the thread at the end, and when it leaves out the rest
    HELD_BYTES, BATCH_BYTES, BATCH = 64 * MIB, 512 * KIB, 64

    def __init__(self, settings: LogSettings, write: Callable[[int, bytes], int] = os.write) -> None:
        self.settings = settings
        self.dropped = 0                        # lines
        self._write = write
        self._changed = threading.Condition()
        self._waiting: List[LogEntry] = []
        self._lines = self._bytes = 0           # of what waits and of what is being written
        self._stopping = threading.Event()
        self._late = math.inf
        self._has_warned = False
        self._thread: Optional[threading.Thread] = None

    @property
    def takes_server(self) -> bool:
        """Whether requests and the life of the server are logged."""
        return self.settings.enabled and self.settings.server

    @property
    def takes_conversation(self) -> bool:
        """Whether bodies are logged."""
        return self.settings.enabled and self.settings.conversation

    def start(self) -> None:
        """Starts the thread, if anything is logged."""
        if self.takes_server or self.takes_conversation:
            self._thread = threading.Thread(target=self._loop, name="log files", daemon=True)
            self._thread.start()

    def stop(self) -> None:
        """Has what waits written, within STOP_S."""
        self._late = time.monotonic() + self.LATE_S
        with self._changed:
            self._stopping.set()
            self._changed.notify_all()
        if self._thread:
            self._thread.join(self.STOP_S)
        if self._lines:
            self.count_dropped(self._lines)
            log.warning("%d log records were not written: %s does not keep up", self._lines, self.settings.dir)

    def put(self, entry: LogEntry) -> None:
        """Takes an entry if there is room, else counts it; never waits for the disk."""
        with self._changed:
            has_room = (self._lines + entry.lines <= self.settings.max_queue_size
                        and self._bytes + entry.size <= self.HELD_BYTES)
            if has_room or entry.is_last:
                self._hold(entry, 1)
                self._waiting.append(entry)
                if len(self._waiting) == 1:
                    self._changed.notify()
                return
            self.dropped += entry.lines
        self._warn(f"{self.settings.dir} does not keep up")

    def note(self, event: str, is_last: bool = False, **facts: Any) -> None:
        """Logs an event of the server's life; the last tells how many lines were dropped."""
        if not self.takes_server:
            return
        record = {"ts": iso_time(time.time()), "event": event, "pid": os.getpid(), **facts}

        def make() -> LogLines:
            return [(SERVER_LOG, {**record, "droppedLogs": self.dropped} if is_last else record)]

        self.put(LogEntry(1, 0, make, is_last))

    def note_exchange(self, done: Exchanged) -> None:
        """Logs one request with its answer."""
        has_bodies = self.takes_conversation and done.answer is not None
        lines = self.takes_server + 2 * has_bodies
        if lines:
            size = len(done.request) + min(done.answer.size, LOGGED_BYTES) if done.answer and has_bodies else 0
            self.put(LogEntry(lines, size, functools.partial(exchange_lines, done, self.takes_server, has_bodies)))

    def _hold(self, entry: LogEntry, sign: int) -> None:
        self._lines += sign * entry.lines
        self._bytes += sign * entry.size

    def _warn(self, problem: str) -> None:
        if not self._has_warned:
            self._has_warned = True
            log.warning("log files: %s; records are dropped", problem)

    def _loop(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._waiting or self._stopping.is_set())
                if not self._waiting:
                    return
            self._stopping.wait(self.PAUSE_S)
            batch = self._take()
            self._write_batch(batch)
            with self._changed:
                for entry in batch:
                    self._hold(entry, -1)

    def _take(self) -> List[LogEntry]:
        """What is written next; when time is short only the last entry is left."""
        with self._changed:
            if time.monotonic() > self._late:
                left_out = [entry for entry in self._waiting if not entry.is_last]
                for entry in left_out:
                    self._hold(entry, -1)
                self.dropped += sum(entry.lines for entry in left_out)
                self._waiting = [entry for entry in self._waiting if entry.is_last]
            count = size = 0
            for entry in self._waiting[:self.BATCH]:
                size += entry.size
                if count and size > self.BATCH_BYTES:
                    break
                count += 1
            batch, self._waiting[:count] = self._waiting[:count], []
            return batch

    def _write_batch(self, batch: Sequence[LogEntry]) -> None:
        texts: Dict[str, List[bytes]] = {}
        for entry in batch:
            try:
                for name, record in entry.make():
                    texts.setdefault(name, []).append(dumps(record).encode("ascii") + b"\n")
            except Exception as error:          # the edge of the thread: one odd record must not end it
                self._lose(entry.lines, f"a record cannot be made ({type(error).__name__})")
            self._stopping.wait(self.YIELD_S)
        for name, lines in texts.items():
            try:
                self._append(os.path.join(self.settings.dir, name), b"".join(lines))
                self._has_warned = False
            except OSError as error:
                self._lose(len(lines), f"{self.settings.dir}: {describe(error)}")

    def count_dropped(self, lines: int) -> None:
        """Adds to the number that the end of the log tells."""
        with self._changed:
            self.dropped += lines

    def _lose(self, lines: int, problem: str) -> None:
        self.count_dropped(lines)
        self._warn(problem)

    def _append(self, path: str, data: bytes) -> None:
        """Appends whole lines in one write; a file that would get too long is put aside first. Opened anew each time:
        another process may have done that. Raises OSError."""
        folder = os.path.dirname(path)
        make_private_folder(folder)
        with one_at_a_time(folder):
            size = os.path.getsize(path) if os.path.exists(path) else 0
            if size and size + len(data) > self.settings.max_file_bytes:
                os.replace(path, path + ".1")
            descriptor = os.open(path, os.O_CREAT | os.O_APPEND | os.O_WRONLY | getattr(os, "O_BINARY", 0), 0o600)
            try:
                size = os.fstat(descriptor).st_size
                if self._write(descriptor, data) < len(data):
                    os.ftruncate(descriptor, size)      # half a line would spoil the next one
                    raise OSError(errno.ENOSPC, "the disk is full")
            finally:
                os.close(descriptor)


class Exchanged(NamedTuple):
    """A request that has been answered, in references: all that its records are made of."""

    stamp: Stamp
    head: Optional[Head]
    client: ClientProtocol
    facts: Mapping[str, Any]
    status: int
    ended_at: float                             # epoch seconds
    duration_ms: float
    secrets: Sequence[str] = ()
    asked: str = ""
    usage: Usage = Usage()
    request: bytes = b""
    answer: Optional[Capture] = None

    @property
    def has_failed(self) -> bool:
        """Whether the answer is an error, or became one."""
        return self.status >= 400 or "error" in self.facts


def access_fields(head: Head, request_id: str, status: int, duration_ms: float,
                  facts: Mapping[str, Any]) -> Dict[str, Any]:
    """What is told of every request."""
    return {"id": request_id, "method": head.method,
            "url": redact(urllib.parse.unquote(head.target.partition("?")[0][:400], errors="replace"))[:200],
            "status": status, "durationMs": round(duration_ms, 1), **facts,
            "safeHeaders": {name: redact(head.headers[name][:400])[:200] for name in LOGGED_HEADERS
                            if name in head.headers}}


def exchange_lines(done: Exchanged, is_server: bool, has_bodies: bool) -> LogLines:
    """The records of a request, without secrets."""
    hidden = quoted_forms(done.secrets)
    lines = [(SERVER_LOG, hide_secrets(server_record(done), hidden))] if is_server else []
    if has_bodies:
        lines += [(CONVERSATION_LOG, record) for record in conversation_records(done, hidden)]
    return lines


def server_record(done: Exchanged) -> Dict[str, Any]:
    """The line of a request in the server's file."""
    name = done.stamp.request_id
    fields = access_fields(done.head, name, done.status, done.duration_ms, done.facts) if done.head else {
        "id": name, "status": done.status, **done.facts}
    return {"ts": iso_time(done.ended_at), "event": "http_error" if done.has_failed else "http_access", **fields}


def conversation_records(done: Exchanged, hidden: Sequence[str]) -> List[Dict[str, Any]]:
    """The lines of a request and its answer in the conversations' file. Both are made at the end, since only then is it
    known which values are secret; the first has the time at which the request came."""
    facts = dict(done.facts)
    used = str(facts.pop("model", ""))
    common = present(id=done.stamp.request_id, model=done.asked or None, modelUsed=used or None,
                     provider=used.partition("/")[0] or None, lane=facts.pop("lane", None),
                     stream=facts.pop("stream", None))
    for name in ("tokens_in", "tokens_out"):
        facts.pop(name, None)
    usage = {f"{name}_tokens": count for name, count in done.usage._asdict().items() if count}
    event = "response_error" if done.has_failed else "response"
    asked = {"ts": iso_time(done.ended_at - done.duration_ms / 1000), "event": "request", **common}
    answered = {"ts": iso_time(done.ended_at), "event": event, **common, "status": done.status,
                "latencyMs": round(done.duration_ms, 1), **present(usage=usage or None), **facts}
    cut = {"cut": True} if len(done.request) > LOGGED_BYTES else {}
    return [{**hide_secrets(asked, hidden), **cut, "body": hide_body(done.request[:LOGGED_BYTES], hidden)},
            {**hide_secrets(answered, hidden), **answer_fields(done, hidden)}]


def answer_fields(done: Exchanged, hidden: Sequence[str]) -> Dict[str, Any]:
    """The answer's body. A stream that came to its end is put together, so that no secret stands there in pieces."""
    capture = done.answer or Capture()
    data = b"".join(capture.pieces)
    if capture.size > LOGGED_BYTES:
        return {"cut": True, "body": hide_body(data, hidden)}
    if done.facts.get("stream") and not done.has_failed:
        with contextlib.suppress(GatewayError):
            return {"reassembled": True, "body": hide_secrets(reassembled(done, data), hidden)}
    return {"body": hide_body(data, hidden)}


def reassembled(done: Exchanged, data: bytes) -> Dict[str, Any]:
    """What the client would have got, had it not asked for a stream. Raises `GatewayError`."""
    upstream = UPSTREAM_PROTOCOLS[AnthropicMessages.name if done.client is MESSAGES else OpenAICompletions.name]
    model = Model(done.asked, "", upstream.name, "")
    reader = Settled(upstream.reader(model, done.stamp))
    reply = replace(collect([*reader.feed(data), *reader.end()]), usage=done.usage)     # few clients are sent it
    return done.client.render(Request(done.asked, ()), reply, done.stamp)


# ======================================================================================================================
# §13 HTTP server
# ======================================================================================================================


class Head(NamedTuple):
    """The head of a client's request; `path` without query, version prefix and trailing slash."""

    method: str
    target: str
    path: str
    query: Dict[str, str]
    minor_version: int
    headers: Dict[str, str]


_BARE_LF = re.compile(rb"(?<!\r)\n")
_REQUEST_LINE = re.compile(r"([A-Z]{1,20}) (\S+) HTTP/1\.([01])")
# A browser page may not reach this server unless listed, but applications with an embedded browser may.
_HOST = re.compile(r"(\[[0-9a-f:.]+\]|[^\[\]:]+?)\.?(?::\d*)?")
_LOCAL_ORIGIN = re.compile(r"(?:https?://(?:localhost|127\.0\.0\.1|\[::1\])(?::\d+)?|"
                           r"(?:app|tauri|vscode-webview|vscode-file|capacitor|file|electron|obsidian)://[^\s,]*)")
_CORS_HEADERS = {"access-control-allow-methods": "GET, POST, HEAD, OPTIONS", "access-control-max-age": "600",
                 "access-control-allow-headers": "authorization, content-type, accept, openai-beta, x-api-key, "
                 "x-goog-api-key, anthropic-version, anthropic-beta, anthropic-dangerous-direct-browser-access, "
                 "x-pigateway-strict, x-stainless-arch, x-stainless-async, x-stainless-helper-method, x-stainless-lang, "
                 "x-stainless-os, x-stainless-package-version, x-stainless-retry-count, x-stainless-runtime, "
                 "x-stainless-runtime-version, x-stainless-timeout"}


def origin_form(target: str, headers: Dict[str, str]) -> Tuple[str, Dict[str, str]]:
    """The path of a target in absolute form, as clients write it for proxies, and the headers with its host in place of
    theirs (RFC 9112 §3.2.2). Raises ValueError for any other target."""
    match = re.fullmatch(r"(?i)http://((?:\[[0-9a-f:.]+\]|[^\[\]:/?#@]+)(?::\d*)?)(/[^#]*)?", target)
    if not match:
        raise ValueError("malformed request target")
    return match.group(2) or "/", {**headers, "host": match.group(1)}


def parse_request_head(data: bytes) -> Head:
    """The head of a request. Raises ValueError for anything that is not strict HTTP/1.1 (RFC 9112)."""
    start, headers = parse_head(data)
    match = _REQUEST_LINE.fullmatch(start)
    if not match:
        raise ValueError("malformed request line")
    method, target, minor = match.group(1), match.group(2), int(match.group(3))
    if minor == 1 and "host" not in headers:
        raise ValueError("no Host header")
    if "transfer-encoding" in headers and minor == 0:
        raise ValueError("Transfer-Encoding in HTTP/1.0")
    if not target.startswith("/") and not (target == "*" and method == "OPTIONS"):
        target, headers = origin_form(target, headers)
    split = urllib.parse.urlsplit(re.sub(r"^/{2,}", "/", target))
    path = urllib.parse.unquote(split.path, errors="replace").replace("//", "/").rstrip("/")
    while path.startswith("/v1/") or path == "/v1":        # also /v1/v1: base URLs get pasted with and without it
        path = path[3:]
    query = dict(urllib.parse.parse_qsl(split.query))
    return Head(method, target, path or "/", query, minor, headers)


class HttpResponder:
    """Answers on a client's connection: head and first piece in one send, chunked when the length is unknown."""

    SEND_TIMEOUT_S = 120.0

    def __init__(self, sock: socket.socket, head: Optional[Head], common: Mapping[str, str], heartbeat_s: float) -> None:
        self._sock = sock
        self._is_head = head is not None and head.method == "HEAD"
        self._chunked = head is not None and head.minor_version == 1
        self._common = common
        self._heartbeat_s = heartbeat_s
        self._pending_head: Optional[bytes] = None
        self.keep_alive = (head is not None and self._chunked
                           and "close" not in head.headers.get("connection", "").lower())
        self.status = 0
        self.capture: Optional[Capture] = None      # what keeps the answer, where it is logged
        self._scope: Optional[Scope] = None

    def _head(self, status: int, headers: Mapping[str, str]) -> bytes:
        self.status = status
        try:
            reason = http.HTTPStatus(status).phrase
        except ValueError:
            reason = "Overloaded" if status == 529 else "Error"
        lines = [f"HTTP/1.1 {status} {reason}"]
        lines.extend(f"{name}: {value}" for name, value in {**self._common, **headers}.items())
        lines.append("connection: keep-alive" if self.keep_alive else "connection: close")
        return ("\r\n".join(lines) + "\r\n\r\n").encode("latin-1", "replace")

    def _send(self, data: bytes) -> None:
        try:
            send_all(self._sock, data, self.SEND_TIMEOUT_S)
        except OSError:
            self.keep_alive = False
            raise ClientGone from None

    def send(self, status: int, headers: Mapping[str, str], body: bytes) -> None:
        """A whole answer."""
        if self.capture:
            self.capture.add(body)
        head = self._head(status, {**headers, "content-length": str(len(body))} if status != 204 else headers)
        self._send(head if self._is_head or status == 204 else head + body)

    def begin(self, status: int, headers: Mapping[str, str]) -> None:
        """The head of a streamed answer; it goes out with the first `write`."""
        if self._chunked:
            headers = {**headers, "transfer-encoding": "chunked"}
        else:
            self.keep_alive = False
        self._pending_head = self._head(status, headers)

    @property
    def has_begun(self) -> bool:
        """Whether the status line is gone, or settled."""
        return self.status != 0

    def write(self, data: bytes) -> None:
        """A piece of a streamed answer, sent at once."""
        if not data:
            return
        if self._scope:
            self._scope.put_off_beat()
        if self.capture:
            self.capture.add(data)
        head, self._pending_head = self._pending_head or b"", None
        self._send(head + (b"%x\r\n%b\r\n" % (len(data), data) if self._chunked else data))

    def finish(self, is_complete: bool) -> None:
        """The end of a streamed answer. After a failure the connection is closed as well, for clients that only notice that."""
        head, self._pending_head = self._pending_head or b"", None
        self.keep_alive = self.keep_alive and is_complete
        if head or self._chunked:
            self._send(head + (b"0\r\n\r\n" if self._chunked else b""))

    def forget(self) -> None:
        """Lets go of the scope, which leads back here: a ring of objects would wait for the collector."""
        self._scope = None

    def scope(self) -> Scope:
        """A scope that watches this client."""
        self._scope = Scope(self._sock, self._heartbeat_s)
        return self._scope


class Handler(socketserver.BaseRequestHandler):
    """One client connection, one request after the other."""

    server: Server
    LINGER_S = 2.0

    def handle(self) -> None:
        """Serves requests until the connection ends."""
        self._buffer = b""
        self.server.track(self.request, True)
        try:
            self.request.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            self.request.setblocking(False)
            self._poller = Poller(self.request)
            while self._serve_one() and not self.server.is_stopping:
                pass
        except (OSError, ClientGone):
            pass
        finally:
            self.server.track(self.request, False)

    def _serve_one(self) -> bool:
        """Reads and answers one request; whether the connection can serve another."""
        stamp = Stamp(secrets.token_hex(12), int(self.server.gateway.clock()))
        try:
            head = self._read_head()
        except BadRequest as error:
            responder = HttpResponder(self.request, None, self._common(stamp), 0)
            status, body = CHAT.render_error(error, stamp.request_id)
            log.info("access", extra={"fields": {"kind": "access", "id": stamp.request_id, "status": status,
                                                 "error": error.message}})
            gateway = self.server.gateway
            gateway.journal.note_exchange(Exchanged(stamp, None, CHAT, {"error": error.message}, status,
                                                    gateway.clock(), 0.0))
            responder.send(status, {"content-type": "application/json"}, dumps(body).encode("ascii"))
            self._linger()
            return False
        if head is None:
            return False
        with self.server.busy():
            self.server.settle(self.request)
            return self._answer(head, stamp)

    def _common(self, stamp: Stamp) -> Dict[str, str]:
        return {"x-request-id": stamp.request_id, "request-id": stamp.request_id}

    def _receive(self, deadline: float) -> bytes:
        """What the client sent next, b"" when it has closed. Raises `socket.timeout`."""
        while True:
            try:
                return self.request.recv(RECEIVE_BYTES)
            except BlockingIOError:
                if not self._poller.wait(deadline - time.monotonic()):
                    raise socket.timeout("the client sends nothing") from None

    def _read_head(self) -> Optional[Head]:
        """The next request's head, None when the client is done or idle for too long."""
        deadline = time.monotonic() + (HEAD_TIMEOUT_S if self._buffer else KEEP_ALIVE_S)
        has_begun = bool(self._buffer)
        while True:
            self._buffer = self._buffer.lstrip(b"\r\n") if self._buffer[:1] in (b"\r", b"\n") else self._buffer
            end = self._buffer.find(b"\r\n\r\n")
            if end >= 0 or len(self._buffer) > MAX_HEAD_BYTES:
                break
            started = bool(self._buffer)
            try:
                data = self._receive(deadline)
            except socket.timeout:
                if started:
                    raise RequestTimeout("the request's head took too long") from None
                return None
            if not data:
                return None
            if not has_begun:                   # once: line ends before a request do not make time
                deadline, has_begun = time.monotonic() + HEAD_TIMEOUT_S, True
            self._buffer += data
            if b"\r\n\r\n" not in self._buffer and _BARE_LF.search(self._buffer.lstrip(b"\r\n")):
                raise BadRequest("malformed HTTP request: lines must end in CRLF", code="invalid_http")
        if not 0 <= end <= MAX_HEAD_BYTES:
            raise HeadTooLarge("the request's head is too long")
        data, self._buffer = self._buffer[:end], self._buffer[end + 4:]
        try:
            head = parse_request_head(data)
            body_length(head.headers)
            return head
        except ValueError as error:
            raise BadRequest(f"malformed HTTP request: {error}", code="invalid_http") from None

    def _read_body(self, head: Head) -> bytes:
        """The request's body. Raises `BodyTooLarge` before it has all been read."""
        limit = self.server.config.max_body_bytes
        length = body_length(head.headers)
        if length is not None and length > limit:
            raise BodyTooLarge(f"the body has {length} bytes; at most {limit} are taken (maxBodyBytes)")
        if head.headers.get("expect", "").lower() == "100-continue" and not self._buffer:
            send_all(self.request, b"HTTP/1.1 100 Continue\r\n\r\n", HEAD_TIMEOUT_S)
        deadline = time.monotonic() + self.server.config.body_timeout_ms / 1000
        decoder = Dechunker() if length is None else None
        pieces, size, data, self._buffer = [], 0, self._buffer, b""
        while True:
            try:
                piece = decoder.feed(data) if decoder else data[:max(0, length) - size]
            except ValueError as error:
                raise BadRequest(f"malformed HTTP request: {error}", code="invalid_http") from None
            pieces.append(piece)
            size += len(piece)
            if size > limit:
                raise BodyTooLarge(f"the body has more than {limit} bytes (maxBodyBytes)")
            if decoder.done if decoder else size >= length:
                self._buffer = decoder.rest if decoder else data[len(piece):]
                self._has_unread_body = False
                return b"".join(pieces)
            try:
                data = self._receive(deadline)
            except socket.timeout:
                raise RequestTimeout("the request's body took too long") from None
            if not data:
                raise ClientGone

    def _answer(self, head: Head, stamp: Stamp) -> bool:
        """Answers one request and logs it."""
        server, started = self.server, time.monotonic()
        self._has_unread_body = body_length(head.headers) not in (0, -1)
        client = client_protocol(head)
        common = {**self._common(stamp), **server.cors(head.headers.get("origin"))}
        responder = HttpResponder(self.request, head, common, server.config.heartbeat_interval_ms / 1000)
        exchange = Exchange(client, stamp, head.headers, responder, head.target.partition("?")[2])
        try:
            self._dispatch(head, exchange)
        except (ClientGone, ConnectionError):
            responder.keep_alive = False
            exchange.log["gone"] = True
        except GatewayError as error:
            self._send_error(error, exchange)
        except RecursionError:
            self._send_error(BadRequest("the body is nested too deeply", code="invalid_json"), exchange)
        except Exception as error:              # the outermost edge of the request: nothing may end the thread
            log.error("internal error: %s: %s", type(error).__name__, redact(str(error)))
            log.debug("where it happened", exc_info=True)
            self._send_error(GatewayError("internal error; the gateway's log names it"), exchange)
        status = 499 if exchange.log.pop("gone", False) else responder.status
        duration_ms = (time.monotonic() - started) * 1000
        self._log_access(head, exchange, status, duration_ms)
        self._log_to_files(head, exchange, status, duration_ms)
        responder.forget()
        if exchange.size > LARGE_BODY_BYTES:
            server.trim_memory()
        if self._has_unread_body:
            self._linger()
        return responder.keep_alive and not self._has_unread_body

    def _send_error(self, error: GatewayError, exchange: Exchange) -> None:
        responder = exchange.responder
        exchange.log["error"] = redact(error.message)
        try:
            if responder.has_begun:
                responder.write(exchange.client.error_event(error, exchange.stamp.request_id))
                responder.finish(False)
                return
            if self._has_unread_body:
                responder.keep_alive = False
            headers = {**exchange.answer_headers, "content-type": "application/json"}
            if error.retry_after is not None:
                headers["retry-after"] = str(math.ceil(error.retry_after))
            if error.retryable is not None:
                headers["x-should-retry"] = "true" if error.retryable else "false"
            reply = error.provider_reply
            if reply:
                headers["content-type"] = header_text(reply.content_type)
                responder.send(reply.status, headers, reply.body)
                return
            error.message = redact(error.message)
            status, body = exchange.client.render_error(error, exchange.stamp.request_id)
            responder.send(status, headers, dumps(body).encode("ascii"))
        except ClientGone:
            exchange.log["gone"] = True

    def _log_access(self, head: Head, exchange: Exchange, status: int, duration_ms: float) -> None:
        if log.isEnabledFor(logging.INFO):
            fields = access_fields(head, exchange.stamp.request_id, status, duration_ms, exchange.log)
            log.info("access", extra={"fields": {"kind": "access", **fields}})

    def _log_to_files(self, head: Head, exchange: Exchange, status: int, duration_ms: float) -> None:
        gateway = self.server.gateway
        if gateway.journal.settings.enabled:
            key = self.server.config.api_key
            gateway.journal.note_exchange(Exchanged(
                exchange.stamp, head, exchange.client, exchange.log, status, gateway.clock(), duration_ms,
                [*exchange.secrets, *([key] if key else [])], exchange.asked, exchange.usage, exchange.body or b"",
                exchange.responder.capture))

    def _linger(self) -> None:
        """Lets the answer arrive although the request was not read to its end: closing at once would reset it away."""
        try:
            self.request.shutdown(socket.SHUT_WR)
            deadline = time.monotonic() + self.LINGER_S
            while time.monotonic() < deadline and self._receive(deadline):
                pass
        except OSError:
            pass

    def _dispatch(self, head: Head, exchange: Exchange) -> None:
        """Checks who asks, then serves the route."""
        server, responder = self.server, exchange.responder
        server.check_host(head)
        if head.method == "OPTIONS":
            responder.send(204, {"allow": "GET, POST, HEAD, OPTIONS"}, b"")
            return
        server.check_origin(head)
        server.check_key(head)
        shown = redact(head.target.partition("?")[0])[:200]
        folder = next((path for path in ("/models/*", "/responses/*") if head.path.startswith(path[:-1])), "")
        route = ROUTES.get(head.path) or ROUTES.get(folder)
        if route is None:
            raise route_not_found(head.path, f"{head.method} {shown}")
        method = "GET" if head.method == "HEAD" else head.method
        if method not in route:
            exchange.answer_headers["allow"] = ", ".join(route)
            raise MethodNotAllowed(f"{shown} takes {' or '.join(route)}, not {head.method}")
        body = self._read_body(head)
        exchange.size = len(body)
        route[method](self, head, exchange, body)

    def _complete(self, head: Head, exchange: Exchange, body: bytes) -> None:
        if self.server.gateway.journal.takes_conversation:
            exchange.body, exchange.responder.capture = body, Capture()
        self.server.gateway.complete(exchange, body)

    def _count_tokens(self, head: Head, exchange: Exchange, body: bytes) -> None:
        self.server.gateway.count_tokens(exchange, body)

    def _count_input(self, head: Head, exchange: Exchange, body: bytes) -> None:
        self.server.gateway.count_input(exchange, body)

    def _no_socket(self, head: Head, exchange: Exchange, body: bytes) -> None:
        """Codex and others first try a websocket here, and take to POST when they are told 426."""
        if head.headers.get("upgrade"):
            exchange.answer_headers["upgrade"] = "HTTP/1.1"
            raise UpgradeRefused("no websocket here: send POST requests")
        exchange.answer_headers["allow"] = "POST"
        raise MethodNotAllowed("/responses takes POST, not GET")

    def _not_kept(self, head: Head, exchange: Exchange, body: bytes) -> None:
        name = head.path.split("/")[2]
        if name == "compact":
            raise RouteNotFound("conversations are not compacted here; summarise with an ordinary request")
        raise RouteNotFound(f'no response "{redact(name[:100])}": none is kept here; send the whole conversation '
                            "with each request", code="response_not_found", param="response_id")

    def _models(self, head: Head, exchange: Exchange, body: bytes) -> None:
        models, created = self.server.gateway.listed(wants_claude(head)), self.server.started_at
        if exchange.client is MESSAGES:
            answer = anthropic_model_page(models, created, head.query)
        else:
            answer = {"object": "list", "data": [openai_model(model, created) for model in models]}
            if "client_version" in head.query:
                # Codex wants a list of this name. A model in it would need the whole of Codex's prompt, which would
                # replace the one that Codex has itself: with none it goes by its own knowledge.
                answer["models"] = []
        self._send_json(exchange, answer)

    def _model(self, head: Head, exchange: Exchange, body: bytes) -> None:
        name = head.path[len("/models/"):]
        gateway = self.server.gateway
        listed = {model.listed_id: model for model in gateway.listed(name.startswith(CLAUDE_ALIAS))}
        model = listed.get(name) or gateway.catalogue.resolve(name, gateway.is_usable)
        if not gateway.is_usable(gateway.catalogue.providers[model.provider]):
            raise ModelNotFound(f'no model "{name[:200]}" here; GET /v1/models lists what there is', param="model")
        shape = anthropic_model if exchange.client is MESSAGES else openai_model
        self._send_json(exchange, shape(model, self.server.started_at))

    def _healthz(self, head: Head, exchange: Exchange, body: bytes) -> None:
        uptime = int((self.server.gateway.clock() - self.server.started_at) * 1000)
        self._send_json(exchange, {"ok": True, "uptimeMs": max(0, uptime)})

    def _status(self, head: Head, exchange: Exchange, body: bytes) -> None:
        gateway = self.server.gateway
        uptime = int((gateway.clock() - self.server.started_at) * 1000)
        self._send_json(exchange, {"ok": True, "name": NAME, "version": VERSION, "pid": gateway.owner_pid or os.getpid(),
                                   "uptimeMs": max(0, uptime), "models": len(gateway.models()),
                                   "streams": sum(gateway.load)})

    def _health(self, head: Head, exchange: Exchange, body: bytes) -> None:
        self._send_json(exchange, {"ok": True})

    def _root(self, head: Head, exchange: Exchange, body: bytes) -> None:
        endpoints = [f"{method} /v1{path}".replace("*", "{id}") for path, methods in ROUTES.items() for method in methods
                     if path not in ("/", "/health", "/healthz", "/status", "/api/hello") and methods[method] not in UNSERVED]
        self._send_json(exchange, {"name": NAME, "version": VERSION, "endpoints": endpoints})

    def _send_json(self, exchange: Exchange, answer: Any) -> None:
        exchange.responder.send(200, {**exchange.answer_headers, "content-type": "application/json"},
                                dumps(answer).encode("ascii"))


ROUTES: Dict[str, Dict[str, Callable[[Handler, Head, Exchange, bytes], None]]] = {
    "/chat/completions": {"POST": Handler._complete},
    "/completions": {"POST": Handler._complete},
    "/embeddings": {"POST": Handler._complete},
    "/messages": {"POST": Handler._complete},
    "/messages/count_tokens": {"POST": Handler._count_tokens},
    "/responses": {"POST": Handler._complete, "GET": Handler._no_socket},
    "/responses/input_tokens": {"POST": Handler._count_input},
    "/responses/*": {"GET": Handler._not_kept, "DELETE": Handler._not_kept, "POST": Handler._not_kept},
    "/models": {"GET": Handler._models},
    "/models/*": {"GET": Handler._model},
    "/status": {"GET": Handler._status},
    "/healthz": {"GET": Handler._healthz},
    "/api/hello": {"GET": Handler._health},     # Claude Code looks whether somebody is there
    "/health": {"GET": Handler._health},
    "/": {"GET": Handler._root},
}

# What the vendors have beside, by the beginning of its path.
NOT_OFFERED = {
    "/messages/batches": "message batches", "/images": "images", "/audio": "speech and transcription",
    "/moderations": "moderation", "/files": "stored files", "/uploads": "stored files", "/batches": "batches",
    "/assistants": "assistants", "/threads": "assistants' threads", "/vector_stores": "vector stores",
    "/fine_tuning": "fine-tuning", "/realtime": "realtime sessions", "/videos": "videos", "/evals": "evaluations",
    "/containers": "containers", "/skills": "skills", "/organization": "administration",
    "/organizations": "administration"}


def route_not_found(path: str, shown: str) -> RouteNotFound:
    """The error for a path without a route; `shown` is how the client wrote it."""
    names = (name for start, name in NOT_OFFERED.items() if path == start or path.startswith(start + "/"))
    name = next(names, None)
    return RouteNotFound(f"{shown}: this gateway does not offer {name}" if name else f"no such path: {shown}")


CLIENT_BY_PATH: Dict[str, ClientProtocol] = {"/completions": TEXTS, "/embeddings": EMBEDDINGS}


UNSERVED = (Handler._no_socket, Handler._not_kept)      # paths that are there to say what is not


def client_protocol(head: Head) -> ClientProtocol:
    """The dialect in which this client is answered: by path, and where both dialects share one, by its headers."""
    if head.path in CLIENT_BY_PATH:
        return CLIENT_BY_PATH[head.path]
    if head.path.startswith("/messages"):
        return MESSAGES
    if head.path.startswith("/responses"):
        return RESPONSES
    if head.path.startswith("/models"):
        headers = head.headers
        agent = headers.get("user-agent", "").lower()
        is_anthropic = ("anthropic-version" in headers or "x-api-key" in headers or agent.startswith("claude-")
                        or "limit" in head.query)
        return MESSAGES if is_anthropic else CHAT
    return MESSAGES if "anthropic-version" in head.headers else CHAT


def wants_claude(head: Head) -> bool:
    """Whether this is Claude Code looking for models: it only takes names with "claude" in them."""
    return head.headers.get("user-agent", "").startswith(("claude-code/", "claude-cli/"))


def openai_model(model: Model, created: float) -> Dict[str, Any]:
    """A model in OpenAI's shape, with its limits in tokens where they are known."""
    return {"id": model.listed_id, "object": "model", "created": int(created), "owned_by": model.provider,
            **present(context_window=model.context_window or None, max_output_tokens=model.max_tokens or None)}


def anthropic_model(model: Model, created: float) -> Dict[str, Any]:
    """A model in Anthropic's shape, with its limits in tokens where they are known."""
    stamp = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(created))
    return {"type": "model", "id": model.listed_id, "display_name": model.name or model.listed_id, "created_at": stamp,
            **present(max_input_tokens=model.context_window or None, max_tokens=model.max_tokens or None)}


def anthropic_model_page(models: Sequence[Model], created: float, query: Mapping[str, str]) -> Dict[str, Any]:
    """A page of models by Anthropic's `limit`, `after_id` and `before_id`."""
    limit = query.get("limit", "20")
    if not re.fullmatch(r"[0-9]{1,4}", limit) or not 1 <= int(limit) <= 1000:
        raise BadRequest("limit: must be between 1 and 1000", param="limit")
    ids = [model.listed_id for model in models]
    first, last = 0, len(models)
    for name in ("after_id", "before_id"):
        if name in query and query[name] not in ids:
            raise BadRequest(f"{name}: no such model", param=name)
    if "after_id" in query:
        first = ids.index(query["after_id"]) + 1
    if "before_id" in query:
        last = ids.index(query["before_id"])
        first = max(first, last - int(limit))
    page = list(models[first:last][:int(limit)])
    has_more = first > 0 if "before_id" in query else first + len(page) < last
    return {"data": [anthropic_model(model, created) for model in page], "has_more": has_more,
            "first_id": page[0].listed_id if page else None, "last_id": page[-1].listed_id if page else None}


LARGE_BODY_BYTES = 256 * KIB
TRIM_S, REAP_S = 0.25, 5.0


def find_trim() -> Optional[Callable[[int], Any]]:
    """glibc's malloc_trim, None elsewhere. Fewer arenas, too: each may keep what its thread once needed."""
    if sys.platform != "linux":
        return None
    import ctypes                               # only here
    try:
        library = ctypes.CDLL(None)
        library.mallopt(-8, 2)                  # M_ARENA_MAX
        library.mallopt(-3, LARGE_BODY_BYTES)   # M_MMAP_THRESHOLD: what is large goes back when it is freed
        return library.malloc_trim
    except (OSError, AttributeError):           # musl
        return None


TRIM: Optional[Callable[[int], Any]] = None     # set when a server runs: importing this file changes nothing


class Server(http.server.ThreadingHTTPServer):
    """Listens and gives each connection a thread. `with server.busy()` counts the requests under way."""

    daemon_threads = True
    allow_reuse_address = os.name != "nt"       # on Windows it would let two servers share a port
    request_queue_size = BACKLOG

    def __init__(self, config: Config, gateway: Gateway, listener: Optional[socket.socket] = None) -> None:
        global TRIM
        TRIM = TRIM or find_trim()
        self.config = config
        self.gateway = gateway
        self.started_at = gateway.clock()
        self.is_stopping = False
        self._sockets: set[socket.socket] = set()
        self._trimmed_at = self._reaped_at = 0.0
        self._trim_due = False
        self._fresh: set[socket.socket] = set()     # connections whose first request has not come yet
        self._active = 0
        self._changed = threading.Condition()
        if ":" in config.bind_address:
            self.address_family = socket.AF_INET6
        super().__init__((config.bind_address, config.port), Handler, listener is None)
        if listener is not None:                # shared with other processes
            self.socket.close()
            self.socket = listener
            self.server_address = listener.getsockname()
        self._assert_bound()

    def server_bind(self) -> None:
        """Binds without the reverse DNS look-up of the stock server, which may take seconds."""
        socketserver.TCPServer.server_bind(self)
        self.server_name, self.server_port = self.server_address[:2]

    def _assert_bound(self) -> None:
        bound = str(self.server_address[0])
        wanted = self.config.bind_address
        if bound != wanted and not (wanted == "localhost" and bound in LOOPBACK_HOSTS):
            self.server_close()
            raise ConfigError(f"bound to {bound} instead of {wanted}")

    @property
    def url(self) -> str:
        """The base URL."""
        host, port = self.server_address[:2]
        return f"http://[{host}]:{port}" if ":" in str(host) else f"http://{host}:{port}"

    def get_request(self) -> Any:
        """Accepts; out of descriptors, pauses, since the loop would come back at once."""
        try:
            return super().get_request()
        except BlockingIOError:                 # another process was faster
            raise
        except OSError:
            time.sleep(0.05)
            raise

    def process_request(self, request: Any, client_address: Any) -> None:
        """Starts a connection's thread. `threading.Thread.start` waits for the thread to run, which stalls accepting
        when many clients connect at once; this does not."""
        import _thread
        with self._changed:
            self._fresh.add(request)
        try:
            _thread.start_new_thread(self.process_request_thread, (request, client_address))
        except RuntimeError:
            log.error("no more threads; a connection was refused")
            self.shutdown_request(request)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Logs what ended a connection's thread; the stock server prints a traceback."""
        error = sys.exc_info()[1]
        log.error("connection ended by %s: %s", type(error).__name__, redact(str(error)))
        log.debug("where it happened", exc_info=True)

    def track(self, sock: socket.socket, is_open: bool) -> None:
        """Keeps the set of open connections."""
        with self._changed:
            (self._sockets.add if is_open else self._sockets.discard)(sock)
        if not is_open:
            self.settle(sock)

    def settle(self, sock: socket.socket) -> None:
        """The connection's first request is here, or will not come."""
        with self._changed:
            self._fresh.discard(sock)
            self._changed.notify_all()

    @contextlib.contextmanager
    def busy(self) -> Iterator[None]:
        """For `with`: a request is under way."""
        with self._changed:
            self._active += 1
        try:
            yield
        finally:
            with self._changed:
                self._active -= 1
                self._changed.notify_all()

    def stop(self, grace_s: float) -> None:
        """Stops accepting, lets what is under way finish within the grace time, then ends it with an error that its
        client can read."""
        self.is_stopping = True
        self.shutdown()
        self._accept_rest()
        self.server_close()
        with self._changed:                     # a proxy that has just been let in is about to send its request
            self._changed.wait_for(lambda: not self._fresh, min(FRESH_S, grace_s))
        if not self._wait_idle(grace_s):
            self.gateway.stop(ShuttingDown("the gateway is stopping"))
            self._wait_idle(2.0)
        with self._changed:
            for sock in self._sockets:
                try:
                    sock.shutdown(socket.SHUT_RDWR)
                except OSError:
                    pass
        self.gateway.transport.close()

    def service_actions(self) -> None:
        """Looks after what nobody is waiting for; the accept loop calls it several times a second."""
        now = time.monotonic()
        if now > self._reaped_at + REAP_S:
            self._reaped_at = now
            self.gateway.transport.reap()
        if self._trim_due:
            self.trim_memory()

    def trim_memory(self) -> None:
        """Gives the memory of large requests back to the system, where the C library keeps it for each thread."""
        now = time.monotonic()
        if TRIM is None or now < self._trimmed_at + TRIM_S:
            self._trim_due = TRIM is not None   # `service_actions` does it
            return
        self._trimmed_at, self._trim_due = now, False
        TRIM(0)

    def _accept_rest(self) -> None:
        """Takes those whom the system has let in already: closing the listener would reset them."""
        self.socket.setblocking(False)
        with contextlib.suppress(OSError):
            for _ in range(BACKLOG):
                self.process_request(*socketserver.TCPServer.get_request(self))

    def _wait_idle(self, limit_s: float) -> bool:
        with self._changed:
            return self._changed.wait_for(lambda: self._active == 0, limit_s)

    def check_host(self, head: Head) -> None:
        """On a loopback address only loopback names are taken, so that no web page gets here by a DNS name of its own."""
        host = head.headers.get("host")
        if host is None or not self.config.is_loopback:
            return
        match = _HOST.fullmatch(host.strip().lower())
        if not match or match.group(1).strip("[]") not in LOOPBACK_HOSTS:
            raise Forbidden("the Host header does not name this machine's loopback address", code="invalid_host")

    def check_origin(self, head: Head) -> None:
        """A page in a browser may only use the gateway when its origin is listed, or local."""
        origin = head.headers.get("origin")
        if origin and not self.cors(origin) and not _LOCAL_ORIGIN.fullmatch(origin.lower()):
            raise Forbidden("this origin is not in allowedOrigins", code="invalid_origin")

    def cors(self, origin: Optional[str]) -> Dict[str, str]:
        """The CORS headers for a page of a listed origin."""
        allowed = self.config.allowed_origins
        if not origin or not (origin in allowed or "*" in allowed):
            return {}
        return {"access-control-allow-origin": "*" if "*" in allowed else header_text(origin), "vary": "origin",
                "access-control-expose-headers": "x-request-id, request-id, retry-after, x-pigateway-lane, "
                "x-pigateway-dropped, x-pigateway-fallback, x-pigateway-model", **_CORS_HEADERS}

    def check_key(self, head: Head) -> None:
        """The client's key, where one is demanded; compared in constant time."""
        wanted = self.config.api_key
        if not wanted or (self.config.is_loopback and not self.config.require_key_on_loopback):
            return
        scheme, _, bearer = head.headers.get("authorization", "").partition(" ")
        given = [head.headers.get("x-api-key", ""), head.headers.get("x-goog-api-key", ""),
                 bearer.strip() if scheme.lower() == "bearer" else ""]
        if not any([hmac.compare_digest(key.encode("utf-8"), wanted.encode("utf-8")) for key in given]):
            raise Unauthorized("missing or wrong API key for this gateway" if any(given) else
                               "no API key: send it as Authorization: Bearer or x-api-key")


# ======================================================================================================================
# §14 Log-ins
# ======================================================================================================================
#
# The dialogue with somebody who logs in: by browser and a listener on this machine (RFC 8252, with RFC 7636), by pasting
# what the browser ended with, or by a code typed into another device (RFC 8628).

LOG_IN_LIMIT_S = 900.0              # for a browser to come back
DEVICE_INTERVAL_S = 5.0             # between two questions whether the code has been entered, unless told otherwise
DEVICE_LIFE_S = 900.0
DEVICE_INTERVAL_MOST_S, DEVICE_LIFE_MOST_S = 120.0, 7200.0
DEVICE_FAILURES = 3                 # in a row that the network may fail while waiting
CALLBACK_PAGE = """<!doctype html><html lang="en"><meta charset="utf-8"><title>{title}</title>
<body style="font-family: sans-serif; margin: 4em auto; max-width: 32em"><h1>{title}</h1><p>{text}</p></body></html>
"""


class Terminal:
    """The person at the keyboard: what a log-in tells and asks."""

    def __init__(self) -> None:
        self.answers: queue.Queue[Tuple[str, str]] = queue.Queue()     # ("line" | "callback" | "end", text)
        self._is_reading = False

    @property
    def is_interactive(self) -> bool:
        """Whether somebody can answer."""
        return bool(sys.stdin and sys.stdin.isatty() and sys.stdout.isatty())

    def say(self, text: str = "") -> None:
        """Prints a line."""
        print(text, flush=True)

    def ask(self, prompt: str) -> str:
        """One line of an answer. Raises `LogInFailed` at the end of the input."""
        print(prompt, end="", flush=True)
        self.read_lines()
        return self.answer()[1]

    def ask_hidden(self, prompt: str) -> str:
        """One line that is not shown while it is typed. Raises `LogInFailed` at the end of the input."""
        if os.name != "posix":
            import getpass                      # only here
            return getpass.getpass(prompt).strip()
        import termios                          # not on Windows
        before = termios.tcgetattr(sys.stdin.fileno())
        silent = [*before[:3], before[3] & ~termios.ECHO, *before[4:]]
        termios.tcsetattr(sys.stdin.fileno(), termios.TCSADRAIN, silent)
        try:
            return self.ask(prompt)
        finally:                                # also after Ctrl-C
            termios.tcsetattr(sys.stdin.fileno(), termios.TCSADRAIN, before)
            self.say()

    def agrees(self, text: str) -> bool:
        """Says something that wants a yes, and asks for it."""
        self.say(text)
        return self.ask("Go on all the same? [y/N] ").lower() in ("y", "yes")

    def answer(self, limit_s: float = math.inf) -> Tuple[str, str]:
        """What comes first: a line that is typed, or what the browser brings back."""
        deadline = time.monotonic() + limit_s
        while time.monotonic() < deadline:
            try:
                kind, text = self.answers.get(timeout=0.2)     # in steps, for the sake of Ctrl-C on Windows
            except queue.Empty:
                continue
            if kind == "end":
                self.say()
                raise LogInFailed("nobody is left to answer")
            return kind, text
        raise LogInFailed(f"no answer within {limit_s / 60:.0f} minutes")

    def read_lines(self) -> None:
        """Begins to take what is typed."""
        if not self._is_reading:
            self._is_reading = True
            threading.Thread(target=self._read, name="keyboard", daemon=True).start()

    def _read(self) -> None:
        # Not sys.stdin: a thread that waits in it when the program ends would bring the interpreter down.
        buffer = b""
        while True:
            try:
                data = os.read(sys.stdin.fileno(), KIB * 16)
            except (OSError, ValueError):
                data = b""
            if not data:
                self.answers.put(("end", ""))
                return
            buffer += data
            while b"\n" in buffer:
                line, _, buffer = buffer.partition(b"\n")
                self.answers.put(("line", line.decode("utf-8", "replace").strip()))

    @staticmethod
    def wait(seconds: float) -> None:
        """Lets time pass."""
        time.sleep(seconds)

    def open_browser(self, url: str) -> None:
        """Opens a page in the user's browser, if there is one with a window."""
        if os.name == "posix" and sys.platform != "darwin" and not any(
                os.environ.get(name) for name in ("DISPLAY", "WAYLAND_DISPLAY", "BROWSER")):
            return                              # one in the terminal would take the keyboard away
        import webbrowser                       # only here
        # beside us: some wait until the browser is closed
        threading.Thread(target=webbrowser.open, args=(url,), name="browser", daemon=True).start()


class CallbackHandler(http.server.BaseHTTPRequestHandler):
    """Takes the browser's return from the vendor's page."""

    server: CallbackServer
    timeout = 10
    server_version, sys_version = NAME, ""

    def do_GET(self) -> None:
        """The redirect target; everything else is not found."""
        split = urllib.parse.urlsplit(self.path)
        query = dict(urllib.parse.parse_qsl(split.query))
        if split.path != self.server.path:
            return self._page(404, "Not found", "There is nothing here.")
        if self.server.state and query.get("state") != self.server.state:
            return self._page(400, "Not this log-in", "This answer belongs to another log-in, which this one ignores. Use "
                              "the link in the terminal.")
        if "error" not in query and not query.get("code"):
            return self._page(400, "No code", "The answer has no code in it. Try again from the link in the terminal.")
        if not self.server.taken.acquire(blocking=False):
            return self._page(409, "Already done", "This log-in has been answered before.")
        title = "Log-in refused" if "error" in query else "Back to the terminal"
        try:
            self._page(200, title, f"You can close this window; {NAME} goes on in the terminal.")
        finally:                                # behind the page, which the end of the program would cut off
            self.server.answers.put(("callback", split.query))

    def _page(self, status: int, title: str, text: str) -> None:
        body = CALLBACK_PAGE.format(title=title, text=text).encode("utf-8")
        self.send_response(status)
        for name, value in (("Content-Type", "text/html; charset=utf-8"), ("Content-Length", str(len(body))),
                            ("Cache-Control", "no-store"), ("Referrer-Policy", "no-referrer"), ("Connection", "close")):
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:
        """Nothing: the address has the code in it."""


class CallbackServer(socketserver.ThreadingTCPServer):      # not HTTPServer, whose bind asks DNS for this machine's name
    """Listens for the browser's return; on this machine only, unless PI_OAUTH_CALLBACK_HOST says otherwise."""

    daemon_threads = True
    request_queue_size = 64
    allow_reuse_address = os.name == "posix"    # on Windows that would share a port somebody else listens on

    def __init__(self, address: Tuple[str, int], path: str, state: str, answers: queue.Queue[Tuple[str, str]]) -> None:
        if ":" in address[0]:
            self.address_family = socket.AF_INET6
        super().__init__(address, CallbackHandler)
        self.path = path
        self.state = state
        self.answers = answers
        self.taken = threading.Lock()           # by the first answer

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A browser that hangs up is none of our business."""


class LogIn:
    """One log-in at one vendor, from the first question to the entry for auth.json."""

    def __init__(self, row: Subscription, vendor: Vendor, terminal: Terminal, arguments: argparse.Namespace) -> None:
        self.row = row
        self.vendor = vendor
        self.terminal = terminal
        self.arguments = arguments

    def run(self) -> Dict[str, Any]:
        """The new entry. Raises `LogInFailed`, `GatewayError`."""
        try:
            return self._run()
        except LogInOver as error:
            raise LogInFailed(f"{self.row.title} refused the log-in: {error.reason or error.message}") from None
        except (ValueError, TypeError, KeyError, AttributeError, OverflowError) as error:
            log.debug("where it happened", exc_info=True)
            raise LogInFailed(f"{self.row.title}: the log-in server's answer makes no sense "
                              f"({type(error).__name__})") from None

    def _run(self) -> Dict[str, Any]:
        row, arguments = self.row, self.arguments
        if arguments.device and not row.device_url:
            raise ConfigError(f"{row.provider} has no log-in by device code; leave --device out")
        if arguments.enterprise and not row.has_domain:
            raise ConfigError("--enterprise goes with github-copilot")
        by_device = bool(row.device_url) and (arguments.device or not row.authorize_url)
        if not by_device and arguments.no_browser:
            self._need_terminal()
        self._confirm_terms()
        if not by_device:
            return self._by_browser()
        return self._by_codex_device() if isinstance(row, CodexSubscription) else self._by_device()

    def _need_terminal(self) -> None:
        if not self.terminal.is_interactive:
            raise ConfigError("this needs a terminal to type into. In one, " + log_in_advice(self.row.provider)
                              + (" --no-browser" if self.arguments.no_browser else ""))

    def _confirm_terms(self) -> None:
        if not self.row.terms or self.arguments.yes:
            return
        if not self.terminal.is_interactive:
            raise ConfigError(f"{self.row.terms} To go on all the same, {log_in_advice(self.row.provider)} --yes")
        if not self.terminal.agrees(f"{self.row.terms}\nWhat it accepts: {self.row.accepted}."):
            raise LogInFailed("not logged in")

    # --- by browser ---

    def _by_browser(self) -> Dict[str, Any]:
        row, terminal = self.row, self.terminal
        verifier = secrets.token_urlsafe(32)
        challenge = base64.urlsafe_b64encode(hashlib.sha256(verifier.encode("ascii")).digest()).decode("ascii").rstrip("=")
        state = secrets.token_urlsafe(24) if row.redirect else ""
        redirect = row.redirect or f"http://localhost:0/oauth/callback/{secrets.token_hex(16)}"
        server = self._listen(redirect, state)
        try:
            redirect = redirect.replace(":0/", f":{server.server_address[1]}/") if server else redirect
            url = self._authorize_url(redirect, state, challenge)
            terminal.say(f"Log in to {row.title} in your browser:\n\n  {url}\n")
            if not self.arguments.no_browser:
                terminal.open_browser(url)
            if terminal.is_interactive:
                terminal.say("On another machine's browser, the last page will not load: paste its address here.")
                print("Waiting for the browser, or the address> ", end="", flush=True)
                terminal.read_lines()
            kind, text = "line", ""
            while not text:                     # an empty line is no answer
                kind, text = terminal.answer(LOG_IN_LIMIT_S)
            if terminal.is_interactive and kind == "callback":
                terminal.say()
        finally:
            if server:
                server.shutdown()
                server.server_close()
        code = read_return(text, state) if kind == "line" else read_code(dict(urllib.parse.parse_qsl(text)), "")
        return row.exchange(self.vendor, code, verifier, redirect, state)

    def _listen(self, redirect: str, state: str) -> Optional[CallbackServer]:
        """The listener for the browser's return; None when nothing can listen and the address is to be pasted."""
        split = urllib.parse.urlsplit(redirect)
        host = os.environ.get("PI_OAUTH_CALLBACK_HOST") or "127.0.0.1"
        try:
            server = CallbackServer((host, split.port or 0), split.path, state, self.terminal.answers)
        except OSError as error:
            if self.arguments.no_browser:
                return None
            raise LogInFailed(f"cannot listen on port {split.port}, where the browser comes back to: {describe(error)}. "
                              "End what uses it (another log-in?), or log in with --no-browser") from None
        threading.Thread(target=server.serve_forever, args=(0.02,), name="callback", daemon=True).start()
        return server

    def _authorize_url(self, redirect: str, state: str, challenge: str) -> str:
        row = self.row
        proof = {"code_challenge": challenge, "code_challenge_method": "S256"}
        if not state:                           # OpenRouter: the path of the address takes the place of the state
            query = {"callback_url": redirect, **proof}
        else:
            query = {**row.parameters, "client_id": row.client_id, "response_type": "code", "redirect_uri": redirect,
                     "scope": row.scope, **proof, "state": state}
        return f"{row.authorize_url}?{urllib.parse.urlencode(query)}"

    # --- by device code ---

    def _by_device(self) -> Dict[str, Any]:
        row, domain = self.row, self._domain()
        headers = COPILOT_HEADERS if domain else {}
        device_url, token_url = row.device_url.format(domain=domain), row.token_url.format(domain=domain)
        fields = row.accept(self.vendor.post(device_url, {"client_id": row.client_id, **row.device_fields}, headers))
        device_code, user_code = fields.get("device_code"), fields.get("user_code")
        url = fields.get("verification_uri_complete") or fields.get("verification_uri")
        if not all(isinstance(value, str) and value for value in (device_code, user_code, url)):
            raise UpstreamProtocolError(f"{row.title}: the log-in server's answer has no code in it")
        self._show_code(url, user_code)
        form = {"client_id": row.client_id, "device_code": device_code, "grant_type": DEVICE_GRANT}

        def poll() -> VendorReply:
            return self.vendor.post(token_url, form, headers)

        reply = self._poll(poll, number_of(fields.get("interval")), number_of(fields.get("expires_in")), True)
        if domain:                              # GitHub's token has no end and no refresh token beside it
            token = row.read({**reply.fields, "refresh_token": reply.fields.get("access_token")}, 0)["refresh"]
            entry = {"type": "oauth", "refresh": token, "access": "", "expires": 0}
            return row.complete({**entry, **({"enterpriseUrl": domain} if domain != "github.com" else {})}, self.vendor)
        return row.complete(row.read(reply.fields, self.vendor.clock()), self.vendor)

    def _domain(self) -> str:
        """GitHub's host; "" for others."""
        if not self.row.has_domain:
            return ""
        domain = host_of((self.arguments.enterprise or "github.com").lower())
        if not domain:
            raise ConfigError("--enterprise takes the address of a GitHub Enterprise server, like company.ghe.com")
        return domain

    def _by_codex_device(self) -> Dict[str, Any]:
        row = self.row
        reply = self.vendor.post(f"{row.device_url}/usercode", {"client_id": row.client_id}, as_json=True)
        if reply.status == 404:
            raise LogInFailed("this account has no log-in by device code; leave --device out")
        fields = row.accept(reply)
        user_code = fields.get("user_code") or fields.get("usercode")
        form = {"device_auth_id": fields.get("device_auth_id"), "user_code": user_code}
        if not all(isinstance(value, str) and value for value in form.values()):
            raise UpstreamProtocolError(f"{row.title}: the log-in server's answer has no code in it")
        self._show_code("https://auth.openai.com/codex/device", form["user_code"])

        def poll() -> VendorReply:
            reply = self.vendor.post(f"{row.device_url}/token", form, as_json=True)
            is_pending = reply.status in (403, 404) or reply.error == "deviceauth_authorization_pending"
            return reply._replace(fields={"error": "authorization_pending"}, status=400) if is_pending else reply

        fields = self._poll(poll, number_of(fields.get("interval")), DEVICE_LIFE_S, False).fields
        code, verifier = fields.get("authorization_code"), fields.get("code_verifier")
        if not isinstance(code, str) or not isinstance(verifier, str):
            raise UpstreamProtocolError(f"{row.title}: the log-in server answered without a code")
        return row.exchange(self.vendor, code, verifier, "https://auth.openai.com/deviceauth/callback", "")

    def _show_code(self, url: str, user_code: str) -> None:
        if not re.match(r"https?://[^/]", url) or not f"{url}{user_code}".isprintable():
            raise UpstreamProtocolError(f"{self.row.title}: the log-in server names a page that is none")
        self.terminal.say(f"Log in to {self.row.title}: open\n\n  {url}\n\nand enter this code:  {user_code}\n\n"
                          "Waiting for you to finish there; Ctrl-C gives up.")

    def _poll(self, ask: Callable[[], VendorReply], interval_s: float, life_s: float, wait_first: bool) -> VendorReply:
        """Asks until the code has been entered (RFC 8628 §3.5). Raises `LogInFailed`, `UpstreamError`."""
        interval_s = min(max(1.0, interval_s or DEVICE_INTERVAL_S), DEVICE_INTERVAL_MOST_S)
        life_s = min(life_s or DEVICE_LIFE_S, DEVICE_LIFE_MOST_S)
        started, waited_s, failures = time.monotonic(), 0.0, 0
        while True:
            passed_s = max(waited_s, time.monotonic() - started)
            if passed_s >= life_s:
                raise LogInFailed("the code has expired before it was entered; log in again")
            if wait_first or waited_s:
                pause_s = min(interval_s, life_s - passed_s)
                self.vendor.pause(pause_s)
            else:
                pause_s = 0.001
            waited_s += pause_s
            try:
                reply = ask()
            except UpstreamError:
                failures += 1
                if failures >= DEVICE_FAILURES:
                    raise
                continue
            failures = 0
            if reply.ok and not reply.error and reply.fields:
                return reply
            if reply.error == "slow_down":
                asked_s = max(1.0, number_of(reply.fields.get("interval")) or interval_s + 5)
                interval_s = min(asked_s, DEVICE_INTERVAL_MOST_S)
            elif reply.error != "authorization_pending":
                raise LogInFailed(DEVICE_ENDS.get(reply.error) or f"the log-in failed: {reply.said}")


DEVICE_ENDS = {"access_denied": "the log-in was refused in the browser",
               "authorization_denied": "the log-in was refused in the browser",
               "expired_token": "the code has expired before it was entered; log in again"}


def read_code(fields: Mapping[str, str], state: str) -> str:
    """The code in the query that a vendor's page ended with. Raises `LogInFailed`; `state` is what it must carry if it
    carries one."""
    if state and fields.get("state", state) != state:
        raise LogInFailed("this address belongs to another log-in (its state is not ours); log in again")
    if "error" in fields:
        words = re.sub(r"[^\x20-\x7e]", "?", fields.get("error_description") or fields["error"])[:200]
        raise LogInFailed(f"the log-in was refused in the browser: {redact(words)}")
    if not fields.get("code"):
        raise LogInFailed("there is no code in that; paste the whole address that the browser ended at")
    return fields["code"]


def read_return(text: str, state: str) -> str:
    """The code in what a person pasted: an address, `code#state`, the query alone, or the code alone. Raises
    `LogInFailed`."""
    query = text.partition("?")[2] or text
    if "?" in text or re.match(r"(?i)https?://", text) or re.search(r"(?:^|&)(?:code|error)=", query):
        return read_code(dict(urllib.parse.parse_qsl(query.partition("#")[0])), state)
    code, _, given = text.partition("#")
    return read_code({"code": code, "state": given or state}, state)


def run_account_command(arguments: argparse.Namespace, config: Config) -> int:
    """The commands login, logout and accounts. Returns the exit status."""
    path = os.path.join(agent_dir(config, os.environ), "auth.json")
    file, terminal = AuthFile(path), Terminal()
    try:
        if arguments.command == "accounts":
            return print_accounts(file, arguments.json)
        if arguments.command == "logout":
            return log_out(file, terminal, arguments.provider)
        return log_in(file, terminal, arguments, config)
    except (LogInFailed, GatewayError, AuthFileError) as error:
        where = f" (in {os.path.dirname(path)})" if isinstance(error, AuthFileError) else ""
        print(f"{NAME}: {redact(str(error))}{where}", file=sys.stderr)
        return EXIT_FAILURE
    except KeyboardInterrupt:
        print(f"\n{NAME}: given up; nothing was changed", file=sys.stderr)
        return EXIT_INTERRUPTED


def log_in(file: AuthFile, terminal: Terminal, arguments: argparse.Namespace, config: Config) -> int:
    """The command login."""
    row = pick_subscription(terminal, arguments)
    file.check()
    if file.entry(row.provider).get("type") == "api_key" and not arguments.yes:
        if not terminal.is_interactive:
            raise ConfigError(f"auth.json has a key for {row.provider}, which a log-in replaces; --yes for that")
        if not terminal.agrees(f"auth.json has a key for {row.provider}, which this replaces."):
            raise LogInFailed("not logged in")
    entry = obtain_log_in(row, terminal, arguments, config)
    file.change(row.provider, lambda old: entry)
    terminal.say(f"Logged in to {row.title}. Its models are {row.provider}/...; {NAME}.py models lists them.")
    return EXIT_OK


def obtain_log_in(row: Subscription, terminal: Terminal, arguments: argparse.Namespace,
                  config: Config) -> Dict[str, Any]:
    """The entry that a log-in ends in; it is not written yet. Raises `LogInFailed`, `ConfigError`."""
    vendor = Vendor(vendor_transport(ca_bundle(config, os.environ)), pause=Terminal.wait)
    vendor.secrets = []
    try:
        return LogIn(row, vendor, terminal, arguments).run()
    except (LogInFailed, GatewayError) as error:
        raise LogInFailed(redact(str(error), vendor.secrets)) from None


LOG_INS = tuple(name for name, row in SUBSCRIPTIONS.items() if row.authorize_url or row.device_url)


def pick_subscription(terminal: Terminal, arguments: argparse.Namespace) -> Subscription:
    """The subscription that was named, or that the user picks from a list. Raises `ConfigError`, `LogInFailed`."""
    name = arguments.provider
    if not name:
        if not terminal.is_interactive:
            raise ConfigError(f"which one? {log_in_advice('PROVIDER')}, with one of {', '.join(LOG_INS)}")
        numbered = {str(number): known for number, known in enumerate(LOG_INS, 1)}
        for number, known in numbered.items():
            terminal.say(f"  {number:>2}  {SUBSCRIPTIONS[known].title:<26}{known}")
        answer = terminal.ask("Log in to which? (number or name) ")
        name = numbered.get(answer, answer)
    if name not in LOG_INS:
        near = difflib.get_close_matches(name, LOG_INS, 1, 0.4)
        hint = f'; did you mean "{near[0]}"?' if near else "."
        raise ConfigError(f'no log-in for "{redact(name)[:60]}"{hint} Known: {", ".join(LOG_INS)}')
    return SUBSCRIPTIONS[name]


def log_out(file: AuthFile, terminal: Terminal, provider: Optional[str]) -> int:
    """The command logout: forgets a log-in; the vendor's own list of devices still has it until it runs out."""
    known = [name for name, entry in file.read().items() if as_dict(entry).get("type") == "oauth"]
    if not provider and not known:
        terminal.say("There is no log-in.")
        return EXIT_OK
    if not provider:
        raise ConfigError(f"which one? {NAME}.py logout {' | '.join(known)}")
    if provider not in known:
        raise ConfigError(f'there is no log-in for "{redact(provider)[:60]}"'
                          + (f"; there is {', '.join(known)}" if known else ""))
    file.change(provider, lambda old: None)
    terminal.say(f"Logged out of {provider}.")
    return EXIT_OK


def print_accounts(file: AuthFile, as_json: bool) -> int:
    """The command accounts: which log-ins there are and how long their tokens are good; no token, no address."""
    rows = []
    for name, entry in file.read().items():
        entry = as_dict(entry)
        if entry.get("type") == "oauth":
            expires, name = expiry_of(entry), header_text(name)
            rows.append({"provider": name, "title": SUBSCRIPTIONS[name].title if name in SUBSCRIPTIONS else name,
                         "expiresAt": int(expires) if expires < math.inf else None,
                         "renewable": bool(name in SUBSCRIPTIONS and entry.get("refresh"))})
    if as_json:
        print(json.dumps(rows, indent=2))
        return EXIT_OK
    for row in rows:
        print(f"{row['provider']:<20}{row['title']:<28}{describe_validity(row, time.time())}")
    if not rows:
        print(f"There is no log-in. {NAME}.py login makes one.")
    return EXIT_OK


def describe_validity(row: Mapping[str, Any], now: float) -> str:
    """How long a log-in's token is good, in words."""
    if row["expiresAt"] is None:
        return "does not expire"
    left_s = row["expiresAt"] - now
    if left_s <= 0:
        return "is renewed at the next request" if row["renewable"] else "has expired; log in again"
    size, unit = next((size, unit) for size, unit in ((86400, "days"), (3600, "hours"), (60, "minutes"), (1, "seconds"))
                      if left_s >= 2 * size or size == 1)
    return f"token good for {left_s / size:.0f} {unit}" + (", then renewed" if row["renewable"] else "")


# ======================================================================================================================
# §15 Configuration and CLI
# ======================================================================================================================


@dataclass(frozen=True)
class Config:
    """The effective configuration; see `OPTIONS` for the names in files, variables and flags."""

    port: int = 4000
    bind_address: str = "127.0.0.1"
    api_key: Optional[str] = field(default=None, repr=False)
    auth_dir: Optional[str] = None
    log_level: str = "info"
    expose_oauth_subscriptions: Optional[bool] = None
    require_key_on_loopback: bool = False
    allowed_origins: Tuple[str, ...] = ()
    model_allowlist: Optional[Tuple[str, ...]] = None
    model_denylist: Tuple[str, ...] = ()
    pass_through: Tuple[str, ...] = ()
    provider: str = ""
    default_model: str = ""
    providers: Mapping[str, Any] = field(default_factory=dict, repr=False)
    model_map: Mapping[str, Any] = field(default_factory=dict)
    logging: Mapping[str, Any] = field(default_factory=dict)
    retries: int = 2
    force_abort_timeout_ms: int = 5000
    heartbeat_interval_ms: int = 15000
    workers: int = 1
    strict: bool = False
    demo: bool = False
    demo_delay_ms: int = 20
    max_body_bytes: int = 16 * MIB
    body_timeout_ms: int = 120_000
    connect_timeout_ms: int = 10_000
    first_byte_timeout_ms: int = 600_000
    idle_timeout_ms: int = 300_000
    ca_bundle: Optional[str] = None
    pid_file: Optional[str] = None
    sources: Tuple[str, ...] = ()
    origins: Mapping[str, str] = field(default_factory=dict, compare=False)     # where each value is from, by attribute

    @functools.cached_property
    def routing(self) -> ModelMap:
        """The way from a client's name to a model's."""
        return ModelMap(self.model_map, self.provider, self.default_model)

    @property
    def is_loopback(self) -> bool:
        """Whether only this machine can connect."""
        return self.bind_address in LOOPBACK_HOSTS

    @property
    def exposes_subscriptions(self) -> bool:
        """Whether subscriptions are served: on loopback always, elsewhere only when asked for."""
        return self.is_loopback or bool(self.expose_oauth_subscriptions)


DAY_MS = 24 * 3600 * 1000


class Option(NamedTuple):
    """A configuration key: its kind and range, the variable and the flag that also set it. `own` keys are ours; pi-gateway
    refuses a gateway.json that has them, so people who run both put them into pigateway.json."""

    key: str
    kind: str
    env: str = ""
    flag: str = ""
    low: Optional[int] = None
    high: Optional[int] = None
    choices: Tuple[str, ...] = ()
    help: str = ""
    own: bool = False

    @property
    def attribute(self) -> str:
        """The field of `Config`."""
        return re.sub(r"(?<=[a-z])(?=[A-Z])", "_", self.key).lower()

    @property
    def dest(self) -> str:
        """Where argparse keeps the flag: apart from the word that some commands take, which may have the same name."""
        return f"flag_{self.attribute}"


OPTIONS = (
    Option("port", "integer", "PI_GATEWAY_PORT", "--port", 0, 65535, help="port to listen on, 0 = any free one"),
    Option("bindAddress", "string", "PI_GATEWAY_BIND", "--bind", help="address to listen on; others than loopback "
           "need an apiKey"),
    Option("apiKey", "string", "PI_GATEWAY_API_KEY"),
    Option("authDir", "string", "PI_GATEWAY_AUTH_DIR", "--auth-dir", help="folder of auth.json and models.json"),
    Option("allowedOrigins", "list", flag="--allow-origin", help="web origin that may call from a browser, * = any"),
    Option("logLevel", "string", "PI_GATEWAY_LOG_LEVEL", "--log-level", choices=("debug", "info", "warn", "error"),
           help="debug, info, warn or error"),
    Option("modelAllowlist", "list", flag="--model-allowlist", help="only offer this model: provider/id or bare id"),
    Option("modelDenylist", "list", flag="--model-denylist", help="never offer this model"),
    Option("exposeOAuthSubscriptions", "boolean", "PI_GATEWAY_EXPOSE_OAUTH", "--expose-oauth-subscriptions",
           help="offer personal subscriptions beyond loopback too"),
    Option("requireKeyOnLoopback", "boolean", flag="--require-key-on-loopback", help="demand the apiKey on loopback too"),
    Option("forceAbortTimeoutMs", "integer", low=100, high=DAY_MS),
    Option("heartbeatIntervalMs", "integer", low=1000, high=DAY_MS),
    Option("passThrough", "list", flag="--pass-through", own=True,
           help="call this provider with the key or token that the client sends"),
    Option("provider", "string", flag="--provider", help="the provider in charge: models that name none are its own",
           own=True),
    Option("defaultModel", "string", flag="--default-model", help="the model when a request names none", own=True),
    Option("modelMap", "map", own=True),
    Option("providers", "providers", own=True),
    Option("logging", "logging", own=True),
    Option("retries", "integer", low=0, high=10, own=True),
    Option("workers", "integer", flag="--workers", low=1, high=64, help="processes that share the port (not on Windows)",
           own=True),
    Option("strict", "boolean", flag="--strict", help="answer 400 instead of leaving out what a model cannot take",
           own=True),
    Option("demo", "boolean", flag="--demo", help="list the built-in demo model beside others", own=True),
    Option("demoDelayMs", "integer", flag="--demo-delay-ms", low=0, high=60_000,
           help="pause between two words of the demo model", own=True),
    Option("maxBodyBytes", "integer", low=1024, own=True),
    Option("bodyTimeoutMs", "integer", low=100, high=DAY_MS, own=True),
    Option("connectTimeoutMs", "integer", low=100, high=DAY_MS, own=True),
    Option("firstByteTimeoutMs", "integer", low=100, high=DAY_MS, own=True),
    Option("idleTimeoutMs", "integer", low=100, high=DAY_MS, own=True),
    Option("caBundle", "string", own=True),
    Option("pidFile", "string", flag="--pid-file", help="lock file, for several gateways on one machine", own=True),
)
_OPTION_KINDS: Dict[str, Tuple[Callable[[Any], bool], str]] = {
    "integer": (_KINDS["an integer"], "an integer"), "string": (_KINDS["a string"], "a string"),
    "boolean": (_KINDS["a boolean"], "true or false"),
    "list": (lambda value: isinstance(value, list) and all(isinstance(item, str) for item in value),
             "an array of strings"),
    "providers": (lambda value: isinstance(value, dict) and all(isinstance(item, dict) for item in value.values()),
                  "an object of objects by name"),
    "map": (lambda value: isinstance(value, dict) and all(is_model_target(target) for target in value.values()),
            "an object of models, or of arrays of models to be tried in turn, by name"),
    "logging": (lambda value: isinstance(value, dict), "an object")}
# The keys of `logging`, by piai-router's names; its variables count in turn.
LOG_OPTIONS = (
    Option("enabled", "boolean"), Option("server", "boolean"), Option("conversation", "boolean"),
    Option("dir", "string"), Option("maxQueueSize", "integer", low=10, high=1_000_000),
    Option("maxFileBytes", "integer", low=4 * KIB))


def is_model_target(value: Any) -> bool:
    """A model's name; an object with the model and a map of levels, or with such targets by provider; or several of
    these in the order in which they are tried."""
    targets = value if isinstance(value, list) else [value]
    return bool(targets) and all(isinstance(target, dict) and target or isinstance(target, str) and target
                                 for target in targets)


def check_option(option: Option, value: Any, where: str) -> Any:
    """A configuration value, checked; lists become tuples. Raises `ConfigError` naming file or variable, and key."""
    fits, kind = _OPTION_KINDS[option.kind]
    shown = REDACTED if option.key == "apiKey" else repr(value)[:60]
    if not fits(value):
        raise ConfigError(f"{where}: {option.key} must be {kind}, not {shown}")
    if option.choices and value not in option.choices:
        raise ConfigError(f"{where}: {option.key} must be one of {', '.join(option.choices)}, not {shown}")
    if (option.low is not None and value < option.low) or (option.high is not None and value > option.high):
        limits = f"between {option.low} and {option.high}" if option.high is not None else f"at least {option.low}"
        raise ConfigError(f"{where}: {option.key} must be {limits}, not {shown}")
    if option.kind == "logging":
        check_logging(value, where)
    return tuple(value) if option.kind == "list" else value


def check_logging(values: Mapping[str, Any], where: str) -> None:
    """Raises `ConfigError` for what `logging` cannot hold."""
    options = {option.key: option for option in LOG_OPTIONS}
    for key, value in values.items():
        if key not in options:
            near = difflib.get_close_matches(key, options, 1, 0.0)
            raise ConfigError(f'{where}: unknown key "logging.{key}"; the nearest valid key is "logging.{near[0]}"')
        check_option(options[key]._replace(key=f"logging.{key}"), value, where)


def read_log_environment(environ: Mapping[str, str]) -> Dict[str, Any]:
    """What piai-router's variables say of `logging`; of each pair the first that is set counts, if it is understood."""
    values: Dict[str, Any] = {}
    for key in ("enabled", "server", "conversation", "dir"):
        text = environ.get(f"PIAI_LOG_{key.upper()}") or environ.get(f"LOG_{key.upper()}") or ""
        value = SWITCH_WORDS.get(text.strip().lower()) if key != "dir" else text or None
        values.update(present(**{key: value}))
    return {"logging": values} if values else {}


def log_settings(config: Config, environ: Mapping[str, str]) -> LogSettings:
    """`logging` with its defaults, and its folder in full."""
    folder = config.logging.get("dir") or os.path.join(agent_dir(config, environ), "logs")
    fields = {option.attribute: config.logging[option.key] for option in LOG_OPTIONS if option.key in config.logging}
    return LogSettings(**{**fields, "dir": os.path.abspath(os.path.expanduser(folder))})


def read_config_file(path: str, is_required: bool) -> Optional[Dict[str, Any]]:
    """The options of a configuration file by attribute, None when there is no such file and none is needed."""
    data = read_json_file(path, is_required)
    if data is None:
        return None
    is_router = path.endswith(ROUTER_FILE) or any(name in data for name in ROUTER_ONLY)
    return read_options({**({"port": ROUTER_PORT} if is_router else {}), **from_router(data, path)}, path)


def read_json_file(path: str, is_required: bool) -> Any:
    """The object in a JSON file, None when there is no such file and none is needed. Raises `ConfigError`."""
    try:
        with open(path, encoding="utf-8-sig") if is_required else open_text(path) as file:
            data = json.loads(blank_json_comments(file.read()))
    except (FileNotFoundError, NotADirectoryError):
        if is_required:
            raise ConfigError(f"{path}: no such file") from None
        return None
    except OSError as error:
        raise ConfigError(f"{path}: {describe(error)}") from None
    except json.JSONDecodeError as error:
        raise ConfigError(f"{path}: not valid JSON: {error.msg} at line {error.lineno}, column {error.colno}") from None
    except (ValueError, RecursionError):
        raise ConfigError(f"{path}: not valid JSON") from None
    if not isinstance(data, dict):
        raise ConfigError(f"{path}: must hold a JSON object")
    return data


def read_options(data: Mapping[str, Any], path: str) -> Dict[str, Any]:
    """Options by attribute, checked. Raises `ConfigError` naming file and key."""
    options = {option.key: option for option in OPTIONS}
    values = {}
    for key, value in data.items():
        if key not in options:
            near = difflib.get_close_matches(key, options, 1, 0.0)
            raise ConfigError(f'{path}: unknown key "{key}"; the nearest valid key is "{near[0]}"')
        values[options[key].attribute] = check_option(options[key], value, path)
    return values


def read_config_environment(environ: Mapping[str, str]) -> Dict[str, Any]:
    """The options that variables set, by attribute; empty variables are ignored."""
    values: Dict[str, Any] = {}
    for option in OPTIONS:
        text = environ.get(option.env, "") if option.env else ""
        if not text:
            continue
        value: Any = text
        if option.kind == "integer":
            value = int(text) if re.fullmatch(r"\s*-?\d{1,9}\s*", text) else text
        elif option.kind == "boolean":          # as pi-gateway reads it: exactly "true", everything else is no
            value = text == "true"
        elif option.choices:
            value = text.lower()
        values[option.attribute] = check_option(option, value, option.env)
    return values


def load_config(environ: Mapping[str, str], flags: Mapping[str, Any] = MappingProxyType({}),
                extra_file: Optional[str] = None) -> Config:
    """Defaults < ~/.pi/agent/gateway.json < pigateway.json beside it < `extra_file` < environment < `flags`. Without any of
    the files, piai-router's own. Raises `ConfigError`."""
    values: Dict[str, Any] = {}
    sources: List[str] = []
    origins: Dict[str, str] = {}
    extra_file = os.path.expanduser(extra_file) if extra_file else None
    for path in config_files(environ, extra_file):
        layer = read_config_file(path, path == extra_file)
        if layer is not None:
            add_layer(values, layer)
            sources.append(path)
            origins.update(dict.fromkeys(layer, path))
    for layer, source, name_of in (
            (read_router_environment(environ), "environment", lambda option: "environment (piai-router's)"),
            ({**read_config_environment(environ), **read_log_environment(environ)}, "environment",
             lambda option: option.env or "environment"),
            (flags, "command line", operator.attrgetter("flag"))):
        if layer:
            add_layer(values, layer)
            sources += [source] if source not in sources else []
            origins.update({option.attribute: name_of(option) for option in OPTIONS if option.attribute in layer})
    if "providers" in origins:                  # they may settle these two
        origins = {**dict.fromkeys(("provider", "default_model"), origins["providers"]), **origins}
    config = Config(**settle_router(values), sources=tuple(sources), origins=origins)
    check_security(config)
    return config


def config_files(environ: Mapping[str, str], extra_file: Optional[str]) -> List[str]:
    """The files that are read where they are there, the last one wins; `extra_file` has to be there."""
    folder = os.path.join(home(environ), ".pi", "agent")
    paths = [os.path.join(folder, "gateway.json"), os.path.join(folder, "pigateway.json"), *filter(None, [extra_file])]
    router_file = os.path.join(home(environ), ROUTER_FILE)
    return paths if any(map(os.path.exists, paths)) or not os.path.exists(router_file) else [*paths, router_file]


def add_layer(values: Dict[str, Any], layer: Mapping[str, Any]) -> None:
    """Puts a layer of the configuration over the earlier ones; the model map and the providers grow entry by entry."""
    for name, value in layer.items():
        if name == "providers":
            known = values.get(name, {})
            value = {**known, **{key: {**known.get(key, {}), **entry} for key, entry in value.items()}}
        values[name] = {**values.get(name, {}), **value} if name in ("model_map", "logging") else value


# --- piai-router's configuration --------------------------------------------------------------------------------------

ROUTER_FILE = os.path.join(".pirouter", "config.json")
ROUTER_PORT, ROUTER_PROVIDER, ROUTER_MODEL = 8787, "openai-codex", "gpt-5.1-codex-mini"     # its defaults
ROUTER_ONLY = ("gatewayApiKey", "platform", "debug", "http", "upstream")     # keys that tell its files from ours
ROUTER_HTTP = {"maxBodyBytes": "maxBodyBytes", "requestTimeoutMs": "bodyTimeoutMs"}
ROUTER_PROVIDER_KEYS = {
    "api": "a string", "authMode": "a string", "oauthProvider": "a string", "authFile": "a string", "baseUrl": "a string",
    "apiKey": "a string", "defaultModel": "a string", "reasoning": "a boolean", "input": "an array",
    "contextWindow": "a number", "maxTokens": "a number", "headers": "an object", "compat": "an object"}
# Where its variables go: a key, or keys within one; the first variable that is set counts.
ROUTER_VARIABLES: Tuple[Tuple[str, Tuple[str, ...], str], ...] = (
    ("port", ("PORT",), "number"), ("gatewayApiKey", ("ROUTER_API_KEY", "GATEWAY_API_KEY"), "text"),
    ("debug", ("DEBUG",), "boolean"), ("provider", ("PIAI_PROVIDER", "PI_PROVIDER", "MODEL_PLATFORM"), "text"),
    ("modelMap", ("MODEL_MAP_JSON",), "object"), ("http.maxBodyBytes", ("PIAI_MAX_BODY_BYTES",), "number"),
    ("http.requestTimeoutMs", ("PIAI_REQUEST_TIMEOUT_MS",), "number"),
    ("upstream.api", ("PI_API",), "text"), ("upstream.authMode", ("PIAI_AUTH_MODE",), "text"),
    ("upstream.oauthProvider", ("PIAI_OAUTH_PROVIDER",), "text"), ("upstream.authFile", ("PIAI_AUTH_FILE",), "text"),
    ("upstream.baseUrl", ("PI_BASE_URL",), "text"), ("upstream.apiKey", ("PI_API_KEY",), "text"),
    ("upstream.defaultModel", ("PI_MODEL",), "text"), ("upstream.reasoning", ("PI_REASONING",), "boolean"),
    ("upstream.input", ("PI_INPUT_TYPES",), "list"), ("upstream.contextWindow", ("PI_CONTEXT_WINDOW",), "number"),
    ("upstream.maxTokens", ("PI_MAX_TOKENS",), "number"), ("upstream.headers", ("PI_HEADERS_JSON",), "object"),
    ("upstream.compat", ("PI_COMPAT_JSON",), "object"))
SWITCH_WORDS = {**dict.fromkeys(("1", "true", "yes", "on"), True), **dict.fromkeys(("0", "false", "no", "off"), False)}


def from_router(data: Mapping[str, Any], path: str) -> Dict[str, Any]:
    """A configuration that may use piai-router's keys, with ours; see the README's table. Raises `ConfigError`."""
    old = {name: data.get(name) for name in ROUTER_ONLY}
    ours = {name: value for name, value in data.items() if name not in old}
    for name, key, value in (("gatewayApiKey", "apiKey", old["gatewayApiKey"]), ("platform", "provider", old["platform"]),
                             ("debug", "logLevel", "debug" if old["debug"] is True else None)):
        if value:
            ours.setdefault(key, value)
    for name, value in check_object(old["http"], path, "http").items():
        if name not in ROUTER_HTTP:
            raise ConfigError(f'{path}: http: unknown key "{name}"; known: {", ".join(ROUTER_HTTP)}')
        ours.setdefault(ROUTER_HTTP[name], value)
    upstream = dict(check_object(old["upstream"], path, "upstream"))
    named = upstream.pop("provider", None)
    if named:
        ours.setdefault("provider", named)
    providers = dict(check_object(ours.get("providers"), path, "providers"))
    if upstream:                                # it belongs to the provider in charge, which another layer may name
        place = named or ""
        providers[place] = {**check_object(providers.get(place), path, f"providers.{place}"), **upstream}
    if providers:
        ours["providers"] = {name: read_router_provider(entry, name, path) for name, entry in providers.items()}
    return ours


def check_object(value: Any, path: str, name: str) -> Dict[str, Any]:
    """An object of a configuration, {} for none. Raises `ConfigError`."""
    if value is not None and not isinstance(value, dict):
        raise ConfigError(f"{path}: {name} must be an object")
    return value or {}


def read_router_provider(entry: Any, name: str, path: str) -> Dict[str, Any]:
    """A provider as piai-router writes it, checked; a relative `authFile` is beside the configuration. Raises
    `ConfigError`."""
    where = f"{path}: providers.{name or 'upstream'}"
    fields = dict(check_object(entry, path, f"providers.{name}"))
    if isinstance(fields.get("input"), str):
        fields["input"] = [word.strip() for word in fields["input"].split(",") if word.strip()]
    for key, value in fields.items():
        if key not in ROUTER_PROVIDER_KEYS:
            near = difflib.get_close_matches(key, ROUTER_PROVIDER_KEYS, 1, 0.0)
            raise ConfigError(f'{where}: unknown key "{key}"; the nearest valid key is "{near[0]}"')
        if not _KINDS[ROUTER_PROVIDER_KEYS[key]](value):
            raise ConfigError(f"{where}.{key} must be {ROUTER_PROVIDER_KEYS[key]}")
    if fields.get("authMode", "apiKey") not in ("apiKey", "oauth"):
        raise ConfigError(f"{where}.authMode must be apiKey or oauth")
    if fields.get("authFile"):
        fields["authFile"] = os.path.join(os.path.dirname(os.path.abspath(path)), os.path.expanduser(fields["authFile"]))
    return fields


def read_router_environment(environ: Mapping[str, str]) -> Dict[str, Any]:
    """The options that piai-router's variables set, by attribute; what is no number or switch counts as not set."""
    data: Dict[str, Any] = {}
    for place, variables, kind in ROUTER_VARIABLES:
        variable = next((name for name in variables if environ.get(name, "").strip()), None)
        value = read_router_value(environ[variable].strip(), kind, variable) if variable else None
        if value is None:
            continue
        *outer, name = place.split(".")
        (data.setdefault(outer[0], {}) if outer else data)[name] = value
    path = environ.get("MODEL_MAP_FILE", "").strip()
    if path:
        data["modelMap"] = {**data.get("modelMap", {}), **read_json_file(os.path.expanduser(path), True)}
    return read_options(from_router(data, "environment"), "environment")


def read_router_value(text: str, kind: str, variable: str) -> Any:
    """The value of one of piai-router's variables, None when it has none."""
    if kind == "number":
        return int(text) if re.fullmatch(r"[0-9]{1,12}", text) and int(text) > 0 else None
    if kind == "boolean":
        return SWITCH_WORDS.get(text.lower())
    if kind == "list":
        return [word.strip() for word in text.split(",") if word.strip()]
    if kind == "text":
        return text
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        raise ConfigError(f"{variable}: not valid JSON") from None
    return check_object(value, variable, "it")


def settle_router(values: Dict[str, Any]) -> Dict[str, Any]:
    """The options with the provider in charge and its default model filled in, as piai-router would."""
    providers = dict(values.get("providers", {}))
    if not providers:
        return values
    active = values.get("provider") or ROUTER_PROVIDER
    providers[active] = {**providers.get(active, {}), **providers.pop("", {})}
    default = providers[active].get("defaultModel") or (ROUTER_MODEL if active == ROUTER_PROVIDER else "")
    return {"default_model": default, **values, "providers": providers, "provider": active}


def check_security(config: Config) -> None:
    """Raises `ConfigError` for what would leave the keys behind this gateway open to others."""
    if not config.is_loopback and not config.api_key:
        raise ConfigError(f'listening on {config.bind_address} lets other machines in: set "apiKey" in gateway.json, or '
                          "PI_GATEWAY_API_KEY")
    if config.api_key and not (config.api_key.isascii() and config.api_key.isprintable()):
        raise ConfigError("apiKey: only printable ASCII characters can be sent in a header")
    if config.require_key_on_loopback and not config.api_key:
        raise ConfigError('requireKeyOnLoopback needs a key: set "apiKey" in gateway.json, or PI_GATEWAY_API_KEY')


def home(environ: Mapping[str, str]) -> str:
    """The user's home directory."""
    return environ.get("HOME") or os.path.expanduser("~")


def agent_dir(config: Config, environ: Mapping[str, str]) -> str:
    """The folder of auth.json and models.json."""
    chosen = config.auth_dir or environ.get("PI_CODING_AGENT_DIR") or ""
    return os.path.expanduser(chosen) if chosen else os.path.join(home(environ), ".pi", "agent")


def read_models_json(path: str) -> ModelsFile:
    """models.json, or just the built-in table when there is none. Raises `ConfigError` when it is malformed."""
    try:
        with open_text(path) as file:
            return read_models_file(json.loads(strip_json_comments(file.read())))
    except (FileNotFoundError, NotADirectoryError):
        return ModelsFile(dict(PROVIDERS), {}, [])
    except OSError as error:
        raise ConfigError(f"{path}: {describe(error)}") from None
    except json.JSONDecodeError as error:
        raise ConfigError(f"{path}: not valid JSON: {error.msg} at line {error.lineno}, column {error.colno}") from None
    except (BadRequest, AttributeError, ValueError, RecursionError, OverflowError) as error:
        raise ConfigError(f"{path}: {getattr(error, 'message', 'must hold a JSON object with providers')}") from None


def build_catalogue(config: Config, environ: Mapping[str, str]) -> Catalogue:
    """The models that the configuration and models.json leave. Raises `ConfigError`."""
    path = os.path.join(agent_dir(config, environ), "models.json")
    models = read_models_json(path)
    for problem in models.problems:
        log.warning("%s: %s (left out)", path, problem)
    return catalogue_of(config, models)


def catalogue_of(config: Config, models: ModelsFile) -> Catalogue:
    """What models.json holds, with the providers of the configuration over it. Raises `ConfigError`."""
    own_ids = [name for name in config.routing.targets() if name.partition("/")[0] not in models.providers or "/" not in name]
    for name, entry in config.providers.items():
        try:
            adopt_provider(models, name, entry, own_ids if name == config.provider else [])
        except BadRequest as error:
            raise ConfigError(error.message) from None
    if config.provider and config.provider not in models.providers:
        near = difflib.get_close_matches(config.provider, models.providers, 1, 0.6)
        raise ConfigError(f'provider: there is no provider "{config.provider}"' + (
            f'; did you mean "{near[0]}"?' if near else ""))
    return Catalogue(models.providers, models.custom, config.model_allowlist, config.model_denylist, config.demo)


def build_gateway(config: Config, environ: Mapping[str, str]) -> Gateway:
    """A gateway from a configuration and the files it names. Raises `ConfigError`."""
    folder = agent_dir(config, environ)
    catalogue = build_catalogue(config, environ)
    limits = Limits(config.connect_timeout_ms / 1000, config.first_byte_timeout_ms / 1000, config.idle_timeout_ms / 1000)
    certificates = ca_bundle(config, environ)
    transport = Transport(limits, certificates, config.demo_delay_ms / 1000)
    credentials = Credentials(os.path.join(folder, "auth.json"), environ, transport=transport,
                              vendor_transport=vendor_transport(certificates))
    keyless = [name for name, entry in config.providers.items() if entry.get("authMode", "apiKey") == "apiKey"
               and not credentials.usable(catalogue.providers[name])]
    config = replace(config, pass_through=(*config.pass_through, *keyless))     # as piai-router does
    return Gateway(config, catalogue, credentials, transport, quirks=Quirks(os.path.join(folder, QUIRKS_FILE)),
                   journal=Journal(log_settings(config, environ)))


QUIRKS_FILE = "pigateway-quirks.json"


def ca_bundle(config: Config, environ: Mapping[str, str]) -> Optional[str]:
    """The file of trusted certificates, None for the system's; SSL_CERT_FILE and SSL_CERT_DIR are OpenSSL's business."""
    return config.ca_bundle or (None if environ.get("SSL_CERT_FILE") else environ.get("REQUESTS_CA_BUNDLE")) or None


def vendor_transport(certificates: Optional[str]) -> Transport:
    """For those who issue tokens: no connection is kept, since what is sent on a stale one may be sent twice."""
    return Transport(Limits(VENDOR_CONNECT_S, VENDOR_LIMIT_S, VENDOR_LIMIT_S), certificates, keep=0)


class ServerHandle:
    """A running server, for programs that embed it: `url`, `host`, `port`, `gateway`; end it with `stop_server`."""

    def __init__(self, server: Server, discovery: Discovery) -> None:
        self.server = server
        self.discovery = discovery
        self.gateway = server.gateway
        self.host, self.port = server.server_address[:2]
        self.url = server.url


def start_server(config: Optional[Config] = None, environ: Optional[Mapping[str, str]] = None,
                 **overrides: Any) -> ServerHandle:
    """Listens in a background thread and returns at once. Without `config` the usual files and variables count;
    `overrides` are fields of `Config`. No lock file is taken and no signal handler set. Raises `ConfigError`, OSError."""
    environ = os.environ if environ is None else environ
    if config is None:
        config = load_config(environ, overrides)
    elif overrides:
        config = replace(config, **overrides)
    check_security(config)
    return serve(Server(config, build_gateway(config, environ)))


def serve(server: Server) -> ServerHandle:
    """Lets a server accept, in a background thread."""
    discovery = Discovery(server.gateway)
    discovery.start()
    server.gateway.journal.start()
    server.gateway.journal.note("server_start", url=server.url, version=VERSION)
    threading.Thread(target=server.serve_forever, args=(0.1,), name="accept", daemon=True).start()
    return ServerHandle(server, discovery)


def stop_server(handle: ServerHandle, grace_s: Optional[float] = None) -> None:
    """Stops a server; requests under way may finish within the grace time (`force_abort_timeout_ms` by default)."""
    handle.discovery.stop()
    config = handle.server.config
    handle.server.stop(config.force_abort_timeout_ms / 1000 if grace_s is None else grace_s)
    handle.gateway.journal.note("server_stop", is_last=True)
    handle.gateway.journal.stop()
    handle.gateway.credentials.close()


SESSION_VARIABLE = "PIGATEWAY_SESSION"          # tells a gateway that it is there for a client's session only


class AlreadyRunning(Exception):
    """Another live gateway owns the lock file."""

    def __init__(self, pid: int, path: str) -> None:
        super().__init__(f"another gateway is running (pid {pid}, {path})")


class PidFile:
    """The lock that pi-gateway takes too: a file with the owner's pid, created exclusively, removed by its owner."""

    _held: set[str] = set()                     # the files that this process holds

    def __init__(self, path: str) -> None:
        self.path = path

    def read_state(self) -> Dict[str, Any]:
        """What the running gateway has written of itself."""
        try:
            with open(self.path + ".json", encoding="utf-8") as file:
                return as_dict(json.load(file))
        except (OSError, ValueError):
            return {}

    def write_state(self, url: str, argv: Sequence[str]) -> None:
        """Writes where this gateway is and how it was started."""
        state = {"pid": os.getpid(), "url": url, "version": VERSION, "argv": list(argv),
                 "session": bool(os.environ.pop(SESSION_VARIABLE, ""))}
        with contextlib.suppress(OSError):
            write_private_file(self.path + ".json", dumps(state).encode("ascii"))

    def claim(self) -> None:
        """Takes the lock. Raises `AlreadyRunning`, OSError."""
        folder = os.path.dirname(os.path.abspath(self.path))
        make_private_folder(folder)
        with one_at_a_time(folder):
            self._claim()

    def _claim(self) -> None:
        for attempt in (1, 2):
            try:
                descriptor = os.open(self.path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o644)
            except FileExistsError:
                pid = self.owner()
                # our own number that we did not write: a container has begun again, and counts from the same one
                is_old = pid == os.getpid() and self.path not in self._held
                if attempt == 2 or (pid and not is_old and is_gateway_process(pid)):
                    raise AlreadyRunning(pid or 0, self.path) from None
                try:
                    os.unlink(self.path)
                except OSError:
                    pass
                continue
            with os.fdopen(descriptor, "w") as file:
                file.write(f"{os.getpid()}\n")
            if self.owner() == os.getpid():     # another one that found the same stale file may have removed ours
                self._held.add(self.path)
                return
        raise AlreadyRunning(self.owner() or 0, self.path)

    def owner(self) -> Optional[int]:
        """The pid in the file, None when there is no sensible one. A file still empty is given a moment: its owner has
        created it and is about to write."""
        for _ in range(10):
            try:
                descriptor = os.open(self.path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0))
                try:
                    text = os.read(descriptor, 64).decode("ascii", "replace").strip()
                finally:
                    os.close(descriptor)
            except OSError:
                return None
            if text:
                return int(text) if re.fullmatch(r"[1-9][0-9]{0,9}", text) else None
            time.sleep(0.02)
        return None

    def release(self, pid: int = 0) -> None:
        """Gives the lock back, if it is still ours, or that of a process that has ended."""
        self._held.discard(self.path)
        if self.owner() == (pid or os.getpid()):
            for path in (self.path + ".json", self.path):
                with contextlib.suppress(OSError):
                    os.unlink(path)


@contextlib.contextmanager
def one_at_a_time(folder: str) -> Iterator[None]:
    """For `with`: no other process is inside for the same folder, where the system can see to that."""
    descriptor = -1
    try:
        if os.name == "posix":
            import fcntl                        # not on Windows
            with contextlib.suppress(OSError):
                descriptor = os.open(folder, os.O_RDONLY)
                fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        if descriptor >= 0:
            os.close(descriptor)


def is_gateway_process(pid: int) -> bool:
    """Whether a process is alive and, where that can be told, a gateway rather than one that got its number later."""
    if os.name == "nt":
        listing = subprocess.run(["tasklist", "/FI", f"PID eq {pid}", "/NH"], stdout=subprocess.PIPE, check=False)
        return str(pid).encode() in listing.stdout and b"python" in listing.stdout.lower()
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        pass
    command = process_command(pid)
    name = os.path.basename(sys.argv[0]).lower().encode() or b"gateway"
    return command is None or b"gateway" in command.lower() or name in command.lower()


def process_command(pid: int) -> Optional[bytes]:
    """What a process was started with, None where that cannot be told."""
    try:
        with open(f"/proc/{pid}/cmdline", "rb") as file:
            return file.read()
    except OSError:
        pass
    try:                                        # macOS, BSD
        return subprocess.run(["ps", "-p", str(pid), "-o", "command="], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
                              timeout=5, check=False).stdout or None
    except (OSError, subprocess.SubprocessError):
        return None


LIFECYCLE_COMMANDS = ("start", "stop", "restart", "status")
LAUNCH_COMMANDS = ("code", "codex", "gemini")
SET_UP_COMMANDS = ("init", "ui", "check")       # also with files that are not there yet, or are broken
COMMANDS = (*LIFECYCLE_COMMANDS, *LAUNCH_COMMANDS, "env", *SET_UP_COMMANDS, "show", "models", "login", "logout",
            "accounts", "quirks", "pi-extension", "help", "version")
JSON_COMMANDS = ("status", "models", "accounts", "quirks", "show")
VALUE_FLAGS = frozenset({option.flag for option in OPTIONS if option.flag and option.kind != "boolean"}
                        | {"--config", "--enterprise", "--shell", "--client"})
# Flags that are no configuration keys, and the commands that take them.
COMMAND_FLAGS = {"--reset": ("quirks",), "--install": ("pi-extension",), "--force": ("pi-extension", "init", "ui"),
                 "--no-browser": ("login", "init", "ui"), "--device": ("login", "init", "ui"),
                 "--yes": ("login", "init", "ui"), "--enterprise": ("login", "init", "ui"), "--shell": ("env",),
                 "--client": ("init", "ui")}

COMMAND_HELP = (
    ("(none)", "run the gateway in the foreground; Ctrl-C stops it"),
    ("start", "run it in the background; it outlives the terminal and logs to ~/.pi/agent/gateway.log"),
    ("stop", "stop the one that runs"),
    ("restart", "stop it and start it again, with the same options unless others are given"),
    ("status", "say whether one runs, and where (--json)"),
    ("code", "run Claude Code on it; all that follows goes to claude: code --model demo -p Hi"),
    ("codex, gemini", "the same for Codex and Gemini CLI"),
    ("env", "print what points a client here: env [claude, codex, gemini, openai, anthropic or ollama]"),
    ("init, ui", "ask for provider, key, model and client, and write pigateway.json"),
    ("show", "print the configuration in force, and where each value is from (--json)"),
    ("check", "say whether the files are in order, without starting anything"),
    ("models", "print the models that can be used now and exit (--json for all facts)"),
    ("login", "log in to a subscription: login [PROVIDER]; without one, pick from a list"),
    ("logout", "forget a log-in: logout PROVIDER"),
    ("accounts", "print the log-ins and how long their tokens are good (--json)"),
    ("quirks", "print what models turned out not to take (--json); --reset forgets it"),
    ("pi-extension", "with --install, write the extension that starts and stops it from inside pi"),
    ("help", "print this page"),
    ("version", "print the version"))
FLAG_HELP = (
    ("--config PATH", "one more configuration file, over the usual ones; with init: the file to write"),
    ("--json", f"with {', '.join(JSON_COMMANDS)}: print JSON"),
    ("--shell SHELL", "with env: bash, fish, powershell or cmd"),
    ("--client CLIENT", "with init: code, codex, gemini or none"),
    ("--reset", "with quirks: forget them"),
    ("--install, --force", "with pi-extension: write it, also over another file; init takes --force too"),
    ("--no-browser", "with login: paste the address that the browser ends at"),
    ("--device", "with login: a code to type into another device (openai-codex)"),
    ("--enterprise HOST", "with login github-copilot: your GitHub Enterprise server"),
    ("--yes", "with login: no question about the vendor's terms; with init: no question at all"),
    ("--version, --help", "print the version, or this page"))
HELP_TAIL = (
    "--allow-origin, --model-allowlist, --model-denylist and --pass-through may be repeated. --no-strict and its like "
    "turn a switch off that a file turned on.",
    "Keys: set ANTHROPIC_API_KEY, OPENAI_API_KEY, ... or use ~/.pi/agent/auth.json. The gateway's own key is apiKey in "
    "~/.pi/agent/gateway.json or PI_GATEWAY_API_KEY, never a flag.",
    "Everything else: README.md")
HELP_COLUMNS = 79


METAVARS = {"--bind": "ADDRESS", "--auth-dir": "PATH", "--allow-origin": "ORIGIN", "--log-level": "LEVEL",
            "--model-allowlist": "MODEL", "--model-denylist": "MODEL", "--pid-file": "PATH",
            "--pass-through": "PROVIDER", "--provider": "PROVIDER", "--default-model": "MODEL"}


def two_columns(rows: Iterable[Tuple[str, str]], width: int) -> List[str]:
    """Names and what they mean, side by side; what is too long for its column goes on below."""
    lines = []
    for name, text in rows:
        head = f"  {name:<{width}}" if len(name) < width else f"  {name}"
        parts = textwrap.wrap(text, HELP_COLUMNS - width - 2, break_on_hyphens=False)
        lines += [head + parts.pop(0)] if len(name) < width else [head]
        lines += [" " * (width + 2) + part for part in parts]
    return lines


class _Parser(argparse.ArgumentParser):
    def format_help(self) -> str:
        options = [(f"{option.flag} {METAVARS.get(option.flag, 'N')}" if option.kind != "boolean" else option.flag,
                    option.help) for option in OPTIONS if option.flag]
        return "\n".join([
            f"usage: {NAME}.py [command] [options]", "",
            "Serve every model you have access to, to any client, on this machine.", "",
            "commands:", *two_columns(COMMAND_HELP, 15), "",
            "options:", *two_columns((*options, *FLAG_HELP), 27),
            *(f"\n{textwrap.fill(text, HELP_COLUMNS, break_on_hyphens=False)}" for text in HELP_TAIL)]) + "\n"

    def error(self, message: str) -> Any:
        raise ConfigError(f"{message} (see --help)")


def build_parser() -> argparse.ArgumentParser:
    """The command line; flags that also are configuration keys come from `OPTIONS`."""
    parser = _Parser(prog=f"{NAME}.py", allow_abbrev=False)
    parser.add_argument("command", nargs="?", choices=COMMANDS)
    parser.add_argument("provider", nargs="?")
    parser.add_argument("--version", "-v", action="store_true")
    parser.add_argument("--config")
    parser.add_argument("--json", action="store_true")
    for flag in COMMAND_FLAGS:
        parser.add_argument(flag, **({} if flag in VALUE_FLAGS else {"action": "store_true"}))  # type: ignore[arg-type]
    for option in OPTIONS:
        if not option.flag:
            continue
        if option.kind == "boolean":
            parser.add_argument(option.flag, dest=option.dest, action="store_const", const=True)
            parser.add_argument(option.flag.replace("--", "--no-", 1), dest=option.dest, action="store_const",
                                const=False)
        else:
            action = "append" if option.kind == "list" else "store"
            parser.add_argument(option.flag, dest=option.dest, action=action)
    return parser


def read_flags(arguments: argparse.Namespace) -> Dict[str, Any]:
    """The options that flags set, by attribute, checked."""
    values = {}
    for option in OPTIONS:
        value = getattr(arguments, option.dest, None)
        if value is None or not option.flag:
            continue
        if option.kind == "integer":
            value = int(value) if re.fullmatch(r"-?\d{1,9}", value) else value
        values[option.attribute] = check_option(option, value, option.flag)
    return values


def refuse_key_flag(argv: Sequence[str]) -> None:
    """Everybody on the machine can read a process's arguments, so a key is not taken there."""
    if any(re.match(r"--api-?key(=|$)", argument) for argument in argv):
        raise ConfigError("--api-key is refused: other users can read the arguments of a process. Set \"apiKey\" in "
                          "~/.pi/agent/gateway.json, or PI_GATEWAY_API_KEY")


def check_words(parser: argparse.ArgumentParser, argv: Sequence[str]) -> None:
    """A misspelt flag named as such; argparse would take what follows it for a command."""
    known = [flag for action in parser._actions for flag in action.option_strings]
    for argument in argv:
        flag = argument.partition("=")[0]
        if flag.startswith("--") and flag != "--" and flag not in known:
            near = difflib.get_close_matches(flag, known, 1, 0.0)
            raise ConfigError(f"unknown flag {redact(flag)[:60]}; the nearest is {near[0]} (see --help)")


def check_command(arguments: argparse.Namespace) -> None:
    """Raises `ConfigError` for flags and words that the command does not take."""
    command = arguments.command
    if arguments.json and command not in JSON_COMMANDS:
        raise ConfigError(f"--json goes with the commands {', '.join(JSON_COMMANDS)}: {NAME}.py models --json")
    for flag, owners in COMMAND_FLAGS.items():
        if getattr(arguments, flag[2:].replace("-", "_")) and command not in owners:
            raise ConfigError(f"{flag} goes with the {owners[0]} command")
    if arguments.provider and command not in ("login", "logout", "env"):
        raise ConfigError(f"what is {redact(arguments.provider)[:60]!r}? Only login and logout take a provider")


def main(argv: Optional[Sequence[str]] = None) -> int:
    """The command line. Returns the exit status: 0 done, 1 failure, 2 configuration, 3 another gateway is running,
    127 a client that is not installed, 130 given up with Ctrl-C; or a launched client's own."""
    argv = sys.argv[1:] if argv is None else list(argv)
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):      # a legacy code page must not end the program
            stream.reconfigure(errors="replace")
    argv, client_argv = split_launch(argv)
    try:
        refuse_key_flag(argv)
        parser = build_parser()
        check_words(parser, argv)
        arguments = parser.parse_args(argv)
        check_command(arguments)
        if arguments.command == "help":
            parser.print_help()
            return EXIT_OK
        if arguments.version or arguments.command == "version":
            print(NAME, VERSION)
            return EXIT_OK
        if arguments.command in SET_UP_COMMANDS:
            return SET_UP[arguments.command](arguments)
        config = load_config(os.environ, read_flags(arguments), arguments.config)
        forget_own_key(config, os.environ)
        attach_log(config.log_level, [config.api_key] if config.api_key else [])
        if arguments.command == "models":
            return print_models(build_gateway(config, os.environ), arguments.json)
        if arguments.command in LIFECYCLE_COMMANDS:
            return Lifecycle(config, own_arguments(argv, arguments.command)).run(arguments.command, arguments.json)
        if arguments.command in LAUNCH_COMMANDS:
            return Session(config, own_arguments(argv, arguments.command)).run(arguments.command, client_argv)
        if arguments.command == "env":
            return print_environment(config, arguments)
        if arguments.command == "show":
            return print_config(config, arguments.json)
        if arguments.command == "pi-extension":
            return run_pi_extension(config, arguments)
        if arguments.command == "quirks":
            return run_quirks(Quirks(os.path.join(agent_dir(config, os.environ), QUIRKS_FILE)), arguments)
        if arguments.command:
            return run_account_command(arguments, config)
        return run(config, argv, functools.partial(load_config, os.environ, read_flags(arguments), arguments.config))
    except ConfigError as error:
        print(f"{NAME}: {redact(str(error))}", file=sys.stderr)
        return EXIT_CONFIG
    except AlreadyRunning as error:
        print(f"{NAME}: {error}; stop it first, or use --pid-file for a second one", file=sys.stderr)
        return EXIT_RUNNING
    except BrokenPipeError:                     # the reader of our output has seen enough
        sys.stderr.close()
        return EXIT_OK
    except OSError as error:
        print(f"{NAME}: {describe(error)}", file=sys.stderr)
        return EXIT_FAILURE


def run_quirks(quirks: Quirks, arguments: argparse.Namespace) -> int:
    """The command quirks."""
    if arguments.reset:
        quirks.reset()
        print("Forgotten. What models do not take is found out anew.")
    elif arguments.json:
        print(json.dumps(quirks.all(), indent=2))
    else:
        lines = [f"{model}\t{name}\t{f'sent as {other}' if other else 'left out'}"
                 for model, names in sorted(quirks.all().items()) for name, other in names.items()]
        print("\n".join(lines) or "No model has refused a parameter so far.")
    return EXIT_OK


class Lifecycle:
    """The commands start, stop, restart and status: they deal with the gateway that holds the lock file.

    Beside the lock, whose form is pi-gateway's, a running gateway keeps `<lock>.json`: pid, url and arguments."""

    START_S, POLL_S, PROBE_S = 15.0, 0.05, 1.5
    STOP_S = 25.0                               # beyond the grace time: a token on its way is waited for
    LOG_BYTES = 10 * MIB                        # an older log that is longer is put aside at the start

    def __init__(self, config: Config, argv: Sequence[str]) -> None:
        self._config = config
        self._argv = list(argv)
        self._pid_file = PidFile(pid_path(config))
        self.log_path = os.path.join(home(os.environ), ".pi", "agent", "gateway.log")

    def run(self, command: str, as_json: bool) -> int:
        """Runs a command. Raises `AlreadyRunning`, OSError."""
        if command == "status":
            return self.status(as_json)
        if command == "stop":
            return self.stop()
        return self.start() if command == "start" else self.restart()

    def running_pid(self) -> int:
        """The process that runs, 0 for none."""
        pid = self._pid_file.owner() or 0
        return pid if pid and is_gateway_process(pid) else 0

    def start(self) -> int:
        """Starts a gateway that outlives the terminal, and says where it is once it answers."""
        status, pid, url = self.launch()
        if status == EXIT_OK:
            print(f"{NAME} is running at {url} (pid {pid}, log {self.log_path})")
        return status

    def find(self) -> Tuple[int, str]:
        """(pid, URL) of a running gateway of ours; pid 0 when there is none."""
        pid, state = self.running_pid(), self._pid_file.read_state()
        return (pid, str(state.get("url"))) if pid and state.get("pid") == pid else (0, "")

    def is_for_sessions(self) -> bool:
        """Whether the running gateway was started by a session."""
        return bool(self._pid_file.read_state().get("session"))

    def launch(self, **variables: str) -> Tuple[int, int, str]:
        """(exit status, pid, URL) of a gateway that is started, and waited for. Raises `AlreadyRunning`, OSError."""
        pid = self.running_pid()
        if pid:
            raise AlreadyRunning(pid, self._pid_file.path)
        make_private_folder(os.path.dirname(self.log_path))
        if os.path.exists(self.log_path) and os.path.getsize(self.log_path) > self.LOG_BYTES:
            os.replace(self.log_path, self.log_path + ".1")
        descriptor = os.open(self.log_path, os.O_CREAT | os.O_APPEND | os.O_WRONLY, 0o600)
        with os.fdopen(descriptor, "ab") as out:
            begin = os.fstat(out.fileno()).st_size
            process = subprocess.Popen([sys.executable, os.path.abspath(__file__), *self._argv], stdin=subprocess.DEVNULL,
                                       stdout=out, stderr=out, env={**os.environ, **variables}, **detached())
        deadline = time.monotonic() + self.START_S
        while time.monotonic() < deadline:
            state = self._pid_file.read_state()
            if state.get("pid") == process.pid and self._probe(state["url"]):
                return EXIT_OK, process.pid, state["url"]
            if process.poll() == EXIT_RUNNING:  # somebody else was faster
                raise AlreadyRunning(self.running_pid(), self._pid_file.path)
            if process.poll() is not None:
                return self._tell_failure(begin, process.returncode), 0, ""
            time.sleep(self.POLL_S)
        print(f"{NAME}: pid {process.pid} does not answer after {self.START_S:.0f} seconds; see {self.log_path}",
              file=sys.stderr)
        return EXIT_FAILURE, 0, ""

    def _tell_failure(self, begin: int, status: int) -> int:
        with open(self.log_path, "rb") as file:
            file.seek(begin)
            lines = file.read(64 * KIB).decode("utf-8", "replace").strip().splitlines()
        said = [line for line in lines if line.startswith(f"{NAME}:")] or lines[-3:] or [f"{NAME}: ended at once"]
        print("\n".join(said), file=sys.stderr)
        return status if status > 0 else EXIT_FAILURE

    def stop(self) -> int:
        """Asks the running gateway to stop, and waits until it has."""
        pid = self.running_pid()
        if not pid:
            print(f"{NAME}: no gateway is running", file=sys.stderr)
            return EXIT_FAILURE
        if self.end(pid):
            print(f"stopped (pid {pid})")
            return EXIT_OK
        print(f"{NAME}: pid {pid} has been asked to stop and still runs", file=sys.stderr)
        return EXIT_FAILURE

    def end(self, pid: int) -> bool:
        """Asks a gateway to stop, and waits; whether it has."""
        os.kill(pid, signal.SIGTERM)            # on Windows that ends it at once
        deadline = time.monotonic() + self._config.force_abort_timeout_ms / 1000 + self.STOP_S
        while time.monotonic() < deadline:
            if not is_gateway_process(pid):
                self._pid_file.release(pid)
                return True
            time.sleep(self.POLL_S)
        return False

    def restart(self) -> int:
        """Stops the running gateway, if there is one, and starts it again, with its own arguments unless others are
        given."""
        if self.running_pid():
            earlier = self._pid_file.read_state().get("argv")
            if not self._argv and isinstance(earlier, list):
                self._argv = [str(word) for word in earlier]
            status = self.stop()
            if status != EXIT_OK:
                return status
        return self.start()

    def status(self, as_json: bool) -> int:
        """Says what runs, and where."""
        pid = self.running_pid()
        state = self._pid_file.read_state()
        facts: Dict[str, Any] = {"running": bool(pid)}
        if pid:
            url = state["url"] if state.get("pid") == pid else local_url(self._config.bind_address, self._config.port)
            facts.update({"pid": pid, "url": url, **(self._probe(url) or {"problem": "it does not answer"})})
        facts = {name: value for name, value in facts.items() if name not in ("ok", "name")}
        if as_json:
            print(json.dumps(facts, indent=2))
        elif not pid:
            print("not running")
        else:
            print("\n".join(f"{name:<10}{value}" for name, value in facts.items() if name != "running"))
        return EXIT_OK if pid else EXIT_FAILURE

    def _probe(self, url: str) -> Dict[str, Any]:
        """What a gateway says of itself; {} when it does not answer. pi-gateway only has /healthz."""
        return self.ask(url, "/status", "/healthz")

    def ask(self, url: str, *paths: str) -> Dict[str, Any]:
        """The first good answer of a gateway to one of these requests, {} for none."""
        for path in paths:
            split = urllib.parse.urlsplit(url)
            connection = http.client.HTTPConnection(split.hostname or "", split.port, timeout=self.PROBE_S)
            try:
                key = self._config.api_key
                connection.request("GET", path, headers={"authorization": f"Bearer {key}"} if key else {})
                response = connection.getresponse()
                facts = as_dict(json.loads(response.read(MAX_EVENT_BYTES)))
                if response.status == 200:
                    return facts
            except (OSError, http.client.HTTPException, ValueError):
                return {}
            finally:
                connection.close()
        return {}


def detached() -> Dict[str, Any]:
    """How a process is started that outlives this one and its terminal."""
    if os.name == "nt":
        return {"creationflags": getattr(subprocess, "DETACHED_PROCESS", 0)
                | getattr(subprocess, "CREATE_NEW_PROCESS_GROUP", 0)}
    return {"start_new_session": True}


def local_url(bind_address: str, port: int) -> str:
    """Where this machine reaches a server that listens on an address."""
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(bind_address, bind_address)
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def pid_path(config: Config) -> str:
    """The lock file."""
    return os.path.expanduser(config.pid_file) if config.pid_file else os.path.join(
        home(os.environ), ".pi", "agent", "gateway.pid")


def own_arguments(argv: Sequence[str], command: str) -> List[str]:
    """The command line without the command's word and what only that takes."""
    words, rest = list(argv), []
    while words:
        word = words.pop(0)
        if word in VALUE_FLAGS and words:
            rest += [word, words.pop(0)]
        elif word == command:
            return rest + words
        else:
            rest.append(word)
    return rest


def attach_log(level: str, secret_values: Sequence[str] = ()) -> None:
    """Sends log lines of that level and above to standard error."""
    handler = logging.StreamHandler()
    handler.setFormatter(JsonFormatter(secret_values))
    for earlier in [handler for handler in log.handlers if isinstance(handler.formatter, JsonFormatter)]:
        log.removeHandler(earlier)
    log.addHandler(handler)
    log.setLevel(level.upper())


def print_models(gateway: Gateway, as_json: bool) -> int:
    """The `models` command."""
    thread = threading.Thread(target=Discovery(gateway).run, daemon=True)
    thread.start()
    thread.join(1.0)
    models = gateway.models()
    silent = [provider.name for provider in gateway.catalogue.providers.values() if provider.discover
              and gateway.is_usable(provider) and not gateway.catalogue.is_discovered(provider)]
    if silent:
        print(f"{NAME}: no list from {', '.join(silent)} (not reachable, or slower than a second)", file=sys.stderr)
    if not models:
        print(f"{NAME}: no model is left: the allow and deny lists leave out all of them", file=sys.stderr)
    if as_json:
        print(json.dumps([{
            "id": model.full_id, "provider": model.provider, "name": model.name or model.id, "protocol": model.protocol,
            "contextWindow": model.context_window or None, "maxTokens": model.max_tokens or None,
            "reasoning": model.reasoning, "input": model.input,
            "cost": dict(zip(COST_FIELDS, model.cost)) or None}
            for model in models], indent=2))
    else:
        for model in models:
            print(f"{model.full_id}\t{model.provider}")
    return EXIT_OK if models else EXIT_FAILURE


def run(config: Config, argv: Sequence[str] = (), reload: Optional[Callable[[], Config]] = None) -> int:
    """Runs the gateway in the foreground until a signal stops it. `reload` reads the configuration anew."""
    pid_file = PidFile(pid_path(config))
    try:
        pid_file.claim()
    except (OSError, ValueError) as error:      # a locked-down machine; two gateways then only clash at the port
        log.warning("no lock file: %s", describe(error))
    stop_asked = threading.Event()
    at_once: List[Callable[[], None]] = [pid_file.release]

    def on_signal(number: int, frame: Any) -> None:
        if stop_asked.is_set():                 # asked twice: now
            for step in at_once:
                step()
            os._exit(EXIT_OK)
        stop_asked.set()

    try:
        for name in STOP_SIGNALS:
            if hasattr(signal, name) and not (name == "SIGHUP" and signal.getsignal(signal.SIGHUP) == signal.SIG_IGN):
                signal.signal(getattr(signal, name), on_signal)
        try:
            server = Server(config, build_gateway(config, os.environ))
        except OSError as error:
            print(f"{NAME}: cannot listen on {config.bind_address}:{config.port}: {describe(error)}", file=sys.stderr)
            return EXIT_FAILURE
        pid_file.write_state(local_url(config.bind_address, server.server_address[1]), argv)
        print_banner(server)
        if config.workers > 1:
            workers = Workers(server, config.workers, reload)
            at_once.insert(0, workers.kill)
            return workers.run(stop_asked)
        serve_until(stop_asked.wait, server, reload)
        return EXIT_OK
    finally:
        pid_file.release()


STOP_SIGNALS = ("SIGINT", "SIGTERM", "SIGBREAK", "SIGHUP")


def serve_until(is_over: Callable[[float], bool], server: Server, reload: Optional[Callable[[], Config]]) -> None:
    """Serves until `is_over(seconds)`, which waits so long at most, says so."""
    handle = serve(server)
    reloader = Reloader(handle, reload)
    while not is_over(0.5):                     # in steps, for the sake of Ctrl-C on Windows
        reloader.check()
    stop_server(handle)


class Workers:
    """Several processes on one listening socket, started and watched by this one. Each has memory of its own; what they
    share are the files, and the count of requests under way."""

    RESTARTS, RESTART_S = 5, 10.0               # so many ends in so many seconds are not chance

    def __init__(self, server: Server, count: int, reload: Optional[Callable[[], Config]]) -> None:
        if not hasattr(os, "fork"):
            raise ConfigError("workers: this system cannot share a port between processes; leave it at 1")
        import mmap                             # only here
        self._server = server
        self._reload = reload
        self._parent = server.gateway.owner_pid = os.getpid()
        server.gateway.load = memoryview(mmap.mmap(-1, 8 * count)).cast("q")
        server.socket.setblocking(False)        # woken together, one is first
        self._children: Dict[int, int] = {}     # pid → number

    def run(self, stop_asked: threading.Event) -> int:
        """Keeps the workers running until asked to stop. Returns the exit status."""
        for number in range(len(self._server.gateway.load)):
            self._fork(number)
        ends: List[float] = []
        while not stop_asked.wait(0.2):
            pid, status = os.waitpid(-1, os.WNOHANG)
            if pid not in self._children:
                continue
            number = self._children.pop(pid)
            self._server.gateway.load[number] = 0
            now = time.monotonic()
            ends = [end for end in ends if now - end < self.RESTART_S] + [now]
            log.error("worker %d (pid %d) ended with %d", number, pid, status)
            if len(ends) >= self.RESTARTS:
                log.error("workers end as soon as they start; giving up")
                self._stop()
                return EXIT_FAILURE
            self._fork(number)
        self._stop()
        return EXIT_OK

    def kill(self) -> None:
        """Ends the workers at once."""
        for pid in self._children:
            with contextlib.suppress(OSError):
                os.kill(pid, signal.SIGKILL)

    def _stop(self) -> None:
        """Lets the workers finish; they keep to the grace time themselves."""
        self._server.server_close()
        for pid in self._children:
            with contextlib.suppress(OSError):
                os.kill(pid, signal.SIGTERM)
        for pid in list(self._children):
            with contextlib.suppress(ChildProcessError):
                os.waitpid(pid, 0)
            del self._children[pid]

    def _fork(self, number: int) -> None:
        sys.stdout.flush()
        pid = os.fork()
        if pid:
            self._children[pid] = number
            return
        status = EXIT_FAILURE
        try:
            self._work(number)
            status = EXIT_OK
        except Exception as error:              # the edge of the process
            log.error("worker %d: %s: %s", number, type(error).__name__, redact(str(error)))
        finally:
            os._exit(status)

    def _work(self, number: int) -> None:
        stop_asked = threading.Event()
        for name in STOP_SIGNALS:               # Ctrl-C reaches all of them, and the parent passes it on
            if hasattr(signal, name):
                signal.signal(getattr(signal, name), signal.SIG_IGN)
        signal.signal(signal.SIGTERM, lambda number, frame: stop_asked.set())
        self._server.gateway.worker = number
        serve_until(lambda limit_s: stop_asked.wait(limit_s) or os.getppid() != self._parent, self._server, self._reload)


# What only counts from the next start on.
FIXED_OPTIONS = ("port", "bind_address", "auth_dir", "ca_bundle", "pid_file", "workers", "connect_timeout_ms",
                 "first_byte_timeout_ms", "idle_timeout_ms", "demo_delay_ms")


class Reloader:
    """Takes over changes to the configuration files and models.json while the server runs. An edit that is broken is
    told once and changes nothing. auth.json needs none of this: it is looked at for each request."""

    PAUSE_S = 1.0

    def __init__(self, handle: ServerHandle, load: Optional[Callable[[], Config]]) -> None:
        self._handle = handle
        self._load = load
        self._next = 0.0
        self._seen = self._stamps()

    def check(self) -> None:
        """Looks at the files, about once a second."""
        now = time.monotonic()
        if now < self._next:
            return
        self._next = now + self.PAUSE_S
        stamps = self._stamps()
        if stamps == self._seen:
            return
        self._seen = stamps
        try:
            self._take_over()
        except ConfigError as error:
            log.warning("%s; going on with what was read before", redact(str(error)))

    def _stamps(self) -> List[Any]:
        folder = os.path.join(home(os.environ), ".pi", "agent")
        paths = [os.path.join(folder, name) for name in ("gateway.json", "pigateway.json")]
        paths += [path for path in self._handle.server.config.sources if os.path.exists(path)]
        paths.append(os.path.join(agent_dir(self._handle.server.config, os.environ), "models.json"))
        return [(path, FileCache(path).identify()) for path in paths]

    def _take_over(self) -> None:
        server, gateway = self._handle.server, self._handle.gateway
        old = server.config
        config = self._load() if self._load else old
        fixed = [name for name in FIXED_OPTIONS if getattr(config, name) != getattr(old, name)]
        if fixed:
            keys = [option.key for option in OPTIONS if option.attribute in fixed]
            log.warning("%s: changed, but only the next start takes that over", ", ".join(keys))
            config = replace(config, **{name: getattr(old, name) for name in fixed})
        check_security(config)
        catalogue = build_catalogue(config, os.environ)
        catalogue.adopt(gateway.catalogue)
        gateway.catalogue, gateway.config, server.config = catalogue, config, config
        if any(isinstance(handler.formatter, JsonFormatter) for handler in log.handlers):
            attach_log(config.log_level, [config.api_key] if config.api_key else [])
        self._change_journal(log_settings(config, os.environ))
        self._handle.discovery.ask_again()
        log.info("the configuration has been read again")

    def _change_journal(self, settings: LogSettings) -> None:
        """Requests under way are logged where they end."""
        old = self._handle.gateway.journal
        if settings != old.settings:
            journal = self._handle.gateway.journal = Journal(settings)
            journal.start()
            old.stop()
            journal.count_dropped(old.dropped)


def print_banner(server: Server) -> None:
    """What a newcomer needs to see when the gateway has started."""
    gateway, config = server.gateway, server.config
    models = gateway.models()
    counts: Dict[str, int] = {}
    for model in models:
        counts[model.provider] = counts.get(model.provider, 0) + 1
    asking = [provider.name for provider in gateway.catalogue.providers.values()
              if provider.discover and gateway.is_usable(provider) and provider.name not in counts]
    by_provider = ", ".join(f"{name} {count}" for name, count in sorted(counts.items()))
    url = re.sub(r"//(0\.0\.0\.0|\[::\])", "//<address of this machine>", server.url)
    key = "the apiKey" if config.api_key and (not config.is_loopback or config.require_key_on_loopback) else "anything"
    lines = [f"{NAME} {VERSION} listening on {server.url}",
             f"  models             {len(models)} models: {by_provider}" if len(models) != 1 else
             f"  models             1 model: {models[0].full_id}",
             f"  OpenAI clients     base URL {url}/v1   API key: {key}",
             f"  Anthropic clients  base URL {url}      API key: {key}",
             f"  configuration      {', '.join(config.sources) or 'defaults'}"]
    if asking:
        lines.insert(2, f"  asking             {', '.join(asking)}; what they offer is listed when they answer")
    if counts == {DEMO: 1} and not asking:
        lines += ["", "No provider key was found, so only the built-in demo model answers. To use real models, set e.g.",
                  "ANTHROPIC_API_KEY, OPENAI_API_KEY or OPENROUTER_API_KEY, or add a local server to",
                  f"{os.path.join(agent_dir(config, os.environ), 'models.json')}, and start again."]
    if gateway.journal.takes_server or gateway.journal.takes_conversation:
        lines.append(f"  log files          {gateway.journal.settings.dir}"
                     + (", with all that is said" if gateway.journal.takes_conversation else ""))
    if not config.is_loopback:
        lines.append(f"  note               other machines can connect to {config.bind_address}; they need the apiKey")
    print("\n".join(lines), flush=True)


# --- Launchers --------------------------------------------------------------------------------------------------------
#
# A client that is started here gets variables and arguments for its own process only; its files stay as they are. The
# gateway is the one that runs, or one that is started for as long as there is a session: who comes joins a list beside
# the lock file, and who leaves last ends the gateway, if a session has started it.


class Target(NamedTuple):
    """What a client is pointed at."""

    url: str
    key: str = NAME             # some word where no key is demanded; "" when the client's own credential passes through
    model: str = ""             # "" when the client's own names mean something here
    window: int = 0             # that model's tokens of context, 0 when not known
    is_foreign: bool = False    # whether the model's maker is not the client's


CLAUDE_MODELS = ("ANTHROPIC_MODEL", "ANTHROPIC_DEFAULT_OPUS_MODEL", "ANTHROPIC_DEFAULT_SONNET_MODEL",
                 "ANTHROPIC_DEFAULT_HAIKU_MODEL", "ANTHROPIC_DEFAULT_FABLE_MODEL")
COMPACT_LEAST = 100_000         # Claude Code warns of, and ignores, a smaller window to compact in


def claude_variables(target: Target) -> Dict[str, str]:
    """For Claude Code 2.1. It takes a model that it does not know for one with a window of a million tokens, and heads
    each prompt with a line that only Anthropic reads. A window for compacting counts also for models it does know."""
    window = str(target.window)
    return {"ANTHROPIC_BASE_URL": target.url, **({"ANTHROPIC_AUTH_TOKEN": target.key} if target.key else {}),
            **(dict.fromkeys(CLAUDE_MODELS, target.model) if target.model else {}),
            **({"CLAUDE_CODE_ATTRIBUTION_HEADER": "0"} if target.is_foreign else {}),
            **({"CLAUDE_CODE_MAX_CONTEXT_TOKENS": window} if target.window else {}),
            **({"CLAUDE_CODE_AUTO_COMPACT_WINDOW": window} if target.window >= COMPACT_LEAST else {})}


CODEX_KEY = "PIGATEWAY_API_KEY"                 # a name of our own: nobody takes the word in it for OpenAI's key


def codex_variables(target: Target) -> Dict[str, str]:
    """For Codex: the key alone; the rest are arguments."""
    return {CODEX_KEY: target.key} if target.key else {}


def codex_arguments(target: Target) -> List[str]:
    """For Codex 0.169: a provider of ours, beside what its config.toml has. The values are TOML."""
    provider = {"name": NAME, "base_url": f"{target.url}/v1", "wire_api": "responses",
                "env_key": CODEX_KEY if target.key else "OPENAI_API_KEY"}
    settings = {"model_provider": NAME, **{f"model_providers.{NAME}.{key}": value for key, value in provider.items()},
                **({"model": target.model} if target.model else {}),
                **({"model_context_window": target.window} if target.window else {})}
    return [word for key, value in settings.items() for word in ("-c", f"{key}={json.dumps(value)}")]


def gemini_variables(target: Target) -> Dict[str, str]:
    """For Gemini CLI 0.61."""
    return {"GOOGLE_GEMINI_BASE_URL": target.url, **({"GEMINI_API_KEY": target.key} if target.key else {}),
            **({"GEMINI_MODEL": target.model} if target.model else {})}


# Gemini CLI 0.61 refuses without a terminal the way to authorise that it derives from a base URL, and in one prefers
# the log-in that its settings name. Settings of the system have the last word, and their place is a variable.
GEMINI_SETTINGS = {"security": {"auth": {"selectedType": "gemini-api-key"}}}
GEMINI_SETTINGS_VARIABLE = "GEMINI_CLI_SYSTEM_SETTINGS_PATH"
GEMINI_SYSTEM_SETTINGS = ("/etc/gemini-cli/settings.json", "/Library/Application Support/GeminiCli/settings.json",
                          r"C:\ProgramData\gemini-cli\settings.json")


def gemini_settings(folder: str) -> Dict[str, str]:
    """The variable that names a file with these settings, which is written there; none where an administrator has one.
    Raises OSError."""
    if any(os.path.exists(path) for path in GEMINI_SYSTEM_SETTINGS):
        return {}
    path = os.path.join(folder, f"{NAME}-gemini.json")
    write_private_file(path, dumps(GEMINI_SETTINGS).encode("ascii"))
    return {GEMINI_SETTINGS_VARIABLE: path}


class Client(NamedTuple):
    """A program, or a kind of program, that can be pointed at the gateway."""

    title: str
    variables: Callable[[Target], Dict[str, str]]
    program: str = ""                           # "" for those that are not started here
    install: str = ""
    arguments: Callable[[Target], List[str]] = lambda target: []
    homes: Tuple[str, ...] = ()                 # providers that know the client's own model names
    prefix: str = ""                            # of those names
    own_key: Tuple[str, ...] = ()               # variables with a key of the user's, which is not to travel
    detours: Tuple[str, ...] = ()               # variables that would lead elsewhere
    settings: Callable[[str], Dict[str, str]] = lambda folder: {}       # variables for files, written into a folder
    model_variable: str = ""                    # where the user may have named a model


CLIENTS = {
    "code": Client(
        "Claude Code", claude_variables, "claude", "npm install -g @anthropic-ai/claude-code", homes=("anthropic",),
        prefix="claude", own_key=("ANTHROPIC_API_KEY", "ANTHROPIC_AUTH_TOKEN", "CLAUDE_CODE_OAUTH_TOKEN"),
        detours=("CLAUDE_CODE_USE_BEDROCK", "CLAUDE_CODE_USE_VERTEX", "CLAUDE_CODE_USE_FOUNDRY",
                 "CLAUDE_CODE_USE_GATEWAY", "CLAUDE_CODE_USE_MANTLE", "CLAUDE_CODE_USE_ANTHROPIC_AWS",
                 "CLAUDE_CODE_USE_ANTHROPIC_GOOGLE_CLOUD"), model_variable="ANTHROPIC_MODEL"),
    "codex": Client(
        "Codex", codex_variables, "codex", "npm install -g @openai/codex", codex_arguments, ("openai", "openai-codex"),
        "gpt", (CODEX_KEY, "OPENAI_API_KEY", "CODEX_API_KEY")),
    "gemini": Client(
        "Gemini CLI", gemini_variables, "gemini", "npm install -g @google/gemini-cli",
        homes=("google", "google-vertex", "google-gemini-cli"), prefix="gemini",
        own_key=("GEMINI_API_KEY", "GOOGLE_API_KEY"), detours=("GOOGLE_GENAI_USE_VERTEXAI", "GOOGLE_GENAI_USE_GCA"),
        settings=gemini_settings, model_variable="GEMINI_MODEL"),
    "openai": Client("OpenAI clients", lambda target: {
        "OPENAI_BASE_URL": f"{target.url}/v1", **({"OPENAI_API_KEY": target.key} if target.key else {})}),
    "anthropic": Client("Anthropic clients", lambda target: {
        "ANTHROPIC_BASE_URL": target.url, **({"ANTHROPIC_API_KEY": target.key} if target.key else {})}),
    "ollama": Client("Ollama clients", lambda target: {"OLLAMA_HOST": target.url}),
}
CLIENT_ALIASES = {"claude": "code", "claude-code": "code", "": "code"}


class NoModel(ConfigError):
    """A client's own names mean nothing here, and nobody has said which model it is to use."""


def find_model(name: str, models: Mapping[str, int], provider: str) -> str:
    """The listed model that a name means, "" for none."""
    wanted = [name, f"{provider}/{name}"]
    return next((known for known in models if known in wanted),
                next((known for known in models if known.partition("/")[2] == name), "")) if name else ""


def map_targets(value: Any) -> List[str]:
    """The model names on the right-hand side of an entry of modelMap, however rich that is."""
    if isinstance(value, str):
        return [value]
    if isinstance(value, Mapping):
        named = [value[key] for key in ("model", "target", "to") if isinstance(value.get(key), str)]
        value = named[:1] or [inner for key, inner in value.items() if key not in ("reasoning", "effort")]
    return [name for inner in value for name in map_targets(inner)] if isinstance(value, (list, tuple)) else []


def choose_target(client: Client, config: Config, url: str, models: Mapping[str, int], named: str = "") -> Target:
    """Where a client goes, given the listed models with their windows, and the model that the user has named. Raises
    `NoModel`."""
    key = "" if set(client.homes) & set(config.pass_through) else config.api_key or NAME
    mapped = [target for name, value in config.model_map.items() for target in map_targets(value)
              if name == "default" or name.rpartition(":")[2].startswith(client.prefix or ":")]
    model = find_model(named, models, config.provider)
    if not client.homes or not model and (not key or mapped):
        used = [find_model(name, models, config.provider) for name in mapped]
    else:
        model = model or default_model(client, config, models)
        used = [model]
    foreign = [name for name in used if name and name.partition("/")[0] not in client.homes]
    window = min([models[name] for name in foreign if models.get(name)], default=0)
    return Target(url, key, model, window, bool(foreign))


def default_model(client: Client, config: Config, models: Mapping[str, int]) -> str:
    """The model for a client where neither the user nor modelMap names one; "" when the client's own names will do.
    Raises `NoModel`."""
    if config.default_model:
        return find_model(config.default_model, models, config.provider) or config.default_model
    offered = [name for name in models if not config.provider or name.startswith(f"{config.provider}/")]
    if any(name.partition("/")[0] in client.homes for name in offered):
        return ""
    if len(offered) == 1:
        return offered[0]
    some = f": {', '.join(offered[:3])} ..." if offered else ""
    raise NoModel(f"which model? {client.title}'s own names mean nothing to what there is here{some} Name one: "
                  f"{NAME}.py --default-model MODEL ..., or keep one with {NAME}.py init; {NAME}.py models lists them")


def named_model(words: Sequence[str]) -> str:
    """The model in a client's arguments, "" for none."""
    for place, word in enumerate(words):
        flag, equals, value = word.partition("=")
        if flag in ("--model", "-m"):
            return value if equals else "".join(words[place + 1:place + 2])
    return ""


def client_environment(client: Client, target: Target, environ: Mapping[str, str]) -> Dict[str, Optional[str]]:
    """What a client's environment has that `environ` has not: None for a variable that must go. Ours is where it goes
    and the key; for the rest, what the user has set stands."""
    ours = {**client.variables(target), **client.settings(os.path.join(home(environ), ".pi", "agent"))}
    gone = client.detours + (client.own_key if target.key else ())
    fixed = {name for name in ours if name in client.own_key or name.endswith(("_BASE_URL", "_HOST"))}
    changes: Dict[str, Optional[str]] = {name: None for name in gone if environ.get(name) and name not in ours}
    changes.update({name: value for name, value in ours.items() if name in fixed or not environ.get(name)})
    if any(environ.get(name) or environ.get(name.upper()) for name in ("http_proxy", "https_proxy", "all_proxy")):
        host = urllib.parse.urlsplit(target.url).hostname or ""
        for name in ("NO_PROXY", "no_proxy"):   # a proxy elsewhere cannot reach this machine's loopback
            known = [part for part in environ.get(name, "").split(",") if part.strip()]
            changes[name] = ",".join(known if host in known else [*known, host])
    return changes


def split_launch(argv: Sequence[str]) -> Tuple[List[str], List[str]]:
    """Our own arguments, with the client's name last, and the client's: all that stands behind its name, as it is."""
    place = 0
    while place < len(argv) and argv[place].startswith("-"):
        place += 2 if argv[place] in VALUE_FLAGS else 1
    end = place + 1 if place < len(argv) and argv[place] in LAUNCH_COMMANDS else len(argv)
    return list(argv[:end]), list(argv[end:])


def forget_own_key(config: Config, environ: Any) -> None:
    """Takes our own key, or the word in its place, out of the variables of providers: `env` may have put it there."""
    for name in {name for provider in PROVIDERS.values() for name in provider.env}:
        if environ.get(name) in (NAME, config.api_key or NAME):
            del environ[name]


class Session:
    """A client's life on a gateway. While it lasts the terminal's signals are the client's; others are passed on."""

    JOIN_S = 15.0                               # for a gateway that somebody else is just starting
    DISCOVERY_S = 1.5                           # for servers to say which models they have

    def __init__(self, config: Config, argv: Sequence[str]) -> None:
        self._config = config
        self._argv = list(argv)
        self._lifecycle = Lifecycle(config, argv)
        self._list = pid_path(config) + ".sessions"
        self._client_pid = 0
        self._asked = 0                         # the signal that came before there was a client

    def run(self, command: str, words: Sequence[str]) -> int:
        """Runs a client to its end. Returns its exit status: 128 + n for one that signal n ended. Raises `ConfigError`,
        `AlreadyRunning`, OSError."""
        client = CLIENTS[command]
        program = shutil.which(client.program)
        if not program:
            print(f"{NAME}: {client.program} is not installed, or not on PATH. To install {client.title}:\n"
                  f"  {client.install}", file=sys.stderr)
            return EXIT_MISSING
        handlers = {number: signal.signal(number, self._on_signal) for number in self._signals()}
        try:
            status, url = self._join()
            if status != EXIT_OK:
                return status
            try:
                return self._run_client(client, program, url, words)
            finally:
                self._leave()
        finally:
            for number, handler in handlers.items():
                signal.signal(number, handler)

    def _run_client(self, client: Client, program: str, url: str, words: Sequence[str]) -> int:
        named = named_model(words) or os.environ.get(client.model_variable, "")
        target = choose_target(client, self._config, url, self._models(url), named)
        changes = client_environment(client, target, os.environ)
        environ = {**os.environ, **changes}
        sys.stdout.flush()
        if self._asked:
            return 128 + self._asked
        process = subprocess.Popen([program, *client.arguments(target), *words],
                                   env={name: value for name, value in environ.items() if value is not None})
        self._client_pid = process.pid
        status = wait_for_client(process)
        self._client_pid = 0
        return 128 - status if status < 0 else status

    # --- signals ---

    @staticmethod
    def _signals() -> List[int]:
        names = ("SIGINT", "SIGQUIT", "SIGTERM", "SIGHUP", "SIGTSTP", "SIGBREAK", "SIGUSR1", "SIGUSR2")
        found = [getattr(signal, name) for name in names if hasattr(signal, name)]
        return [number for number in found if signal.getsignal(number) != signal.SIG_IGN]

    def _on_signal(self, number: int, frame: Any) -> None:
        if not self._client_pid:
            self._asked = self._asked or (0 if number == getattr(signal, "SIGTSTP", 0) else number)
        elif os.name == "posix" and not (number in (signal.SIGINT, signal.SIGQUIT) and is_in_foreground()):
            with contextlib.suppress(ProcessLookupError):
                os.kill(self._client_pid, number)

    # --- the gateway ---

    def _join(self) -> Tuple[int, str]:
        """(exit status, URL) of the gateway for this session. Raises `AlreadyRunning`, OSError."""
        make_private_folder(os.path.dirname(self._list))
        while True:
            pid, url = self._enter()
            if pid:
                return EXIT_OK, url
            try:
                starter = Lifecycle(self._config, self._start_arguments())
                status, pid, url = starter.launch(**{SESSION_VARIABLE: "1"})
            except AlreadyRunning:              # not ours, or not yet serving, since somebody starts it just now
                with contextlib.suppress(OSError):
                    if time.time() - os.stat(pid_path(self._config)).st_mtime > self.JOIN_S:
                        raise
                time.sleep(Lifecycle.POLL_S)
                continue
            if status == EXIT_OK:
                self._enter()
            return status, url

    def _start_arguments(self) -> List[str]:
        """The gateway's arguments: a free port where another program has the usual one."""
        family = socket.AF_INET6 if ":" in self._config.bind_address else socket.AF_INET
        with socket.socket(family) as probe:
            if os.name == "posix":
                probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind((self._config.bind_address, self._config.port))
            except OSError as error:
                if error.errno == errno.EADDRINUSE:
                    return [*self._argv, "--port", "0"]
        return self._argv

    def _enter(self) -> Tuple[int, str]:
        """Puts this session on the list of a running gateway. Returns (pid, URL), pid 0 for no gateway."""
        with one_at_a_time(os.path.dirname(self._list)):
            pid, url = self._lifecycle.find()
            if pid:
                self._write([*self._others(), os.getpid()])
            return pid, url

    def _leave(self) -> None:
        """Takes this session off the list; the last one ends a gateway that a session has started."""
        with one_at_a_time(os.path.dirname(self._list)):
            others = self._others()
            if others:
                return self._write(others)
            with contextlib.suppress(OSError):
                os.unlink(self._list)
            pid, _ = self._lifecycle.find()
            if pid and self._lifecycle.is_for_sessions() and not self._lifecycle.end(pid):
                print(f"{NAME}: pid {pid} has been asked to stop and still runs", file=sys.stderr)

    def _others(self) -> List[int]:
        """The other sessions that live."""
        try:
            with open(self._list, encoding="utf-8") as file:
                noted = as_list(json.load(file))
        except (OSError, ValueError):
            return []
        return [pid for pid in noted if isinstance(pid, int) and pid != os.getpid() and is_gateway_process(pid)]

    def _write(self, sessions: Sequence[int]) -> None:
        write_private_file(self._list, dumps(list(sessions)).encode("ascii"))

    def _models(self, url: str) -> Dict[str, int]:
        """The listed models and their windows. A gateway that has just begun may still be asking servers."""
        known = read_models_json(os.path.join(agent_dir(self._config, os.environ), "models.json")).providers.values()
        is_asking = any(provider.discover and provider.name not in PROVIDERS for provider in known)
        deadline = time.monotonic() + (self.DISCOVERY_S if is_asking else 0)
        while True:
            models = listed_models(self._lifecycle, url)
            if set(models) != {DEMO_MODEL.full_id} or time.monotonic() >= deadline:
                return models
            time.sleep(Lifecycle.POLL_S)


def listed_models(lifecycle: Lifecycle, url: str) -> Dict[str, int]:
    """What a gateway lists, with the windows that it knows."""
    items = [as_dict(item) for item in as_list(lifecycle.ask(url, "/v1/models").get("data"))]
    return {str(item.get("id")): int(number_of(item.get("context_window"))) for item in items}


def wait_for_client(process: subprocess.Popen[bytes]) -> int:
    """The exit status, below 0 for the signal that ended it. When it stops (Ctrl-Z) so does this process, for the shell
    to see, and what wakes this one wakes it."""
    if os.name != "posix":
        return process.wait()
    while True:
        _, status = os.waitpid(process.pid, os.WUNTRACED)
        if not os.WIFSTOPPED(status):
            process.returncode = os.waitstatus_to_exitcode(status)
            return process.returncode
        os.kill(os.getpid(), signal.SIGSTOP)
        with contextlib.suppress(ProcessLookupError):
            os.kill(process.pid, signal.SIGCONT)


def is_in_foreground() -> bool:
    """Whether a terminal's Ctrl-C reaches this process, and what it has started, by itself."""
    try:
        descriptor = os.open("/dev/tty", os.O_RDONLY)
    except OSError:
        return False
    try:
        return os.tcgetpgrp(descriptor) == os.getpgrp()
    except OSError:
        return False
    finally:
        os.close(descriptor)


class Shell(NamedTuple):
    """How a shell sets and removes a variable, and how it writes a text and a comment."""

    export: str
    unset: str
    quote: Callable[[str], str]
    comment: str
    use: str


SHELLS = {
    "bash": Shell("export {}={}", "unset {}", shlex.quote, "#", 'eval "$({})"'),
    "fish": Shell("set -gx {} {}", "set -e {}", lambda text: "'" + re.sub(r"([\\'])", r"\\\1", text) + "'", "#",
                  "{} | source"),
    "powershell": Shell("$env:{} = {}", "Remove-Item Env:{} -ErrorAction SilentlyContinue",
                        lambda text: "'" + re.sub("(['\u2018-\u201b])", r"\1\1", text) + "'", "#",
                        "{} | Out-String | Invoke-Expression"),
    "cmd": Shell('set "{}={}"', 'set "{}="', lambda text: text.replace("%", "%%"), "rem", "{} > on.cmd && on.cmd"),
}


def guess_shell(environ: Mapping[str, str]) -> str:
    """The user's shell, of those that have a row."""
    name = os.path.basename(environ.get("SHELL", "")).lower()
    if os.name == "nt" and not name:
        return "powershell" if environ.get("PSMODULEPATH") else "cmd"
    return "fish" if "fish" in name else "powershell" if "pwsh" in name or "powershell" in name else "bash"


def print_environment(config: Config, arguments: argparse.Namespace) -> int:
    """The command env. The key is for programs to read, not for whoever looks at the screen."""
    name = CLIENT_ALIASES.get(arguments.provider or "", arguments.provider)
    if name not in CLIENTS:
        raise ConfigError(f"env knows claude, {', '.join(name for name in CLIENTS if name != 'code')}, and not "
                          f"{redact(name)[:60]!r}")
    if arguments.shell and arguments.shell not in SHELLS:
        raise ConfigError(f"--shell must be one of {', '.join(SHELLS)}, not {arguments.shell[:60]!r}")
    client, shell = CLIENTS[name], SHELLS[arguments.shell or guess_shell(os.environ)]
    pid, url = Lifecycle(config, []).find()
    target, notes = guess_target(client, config, url)
    notes += [] if pid else [f"No gateway is running yet: {NAME}.py start"]
    words = client.arguments(target)
    notes += [f"{client.program} also needs these arguments: {shlex.join(words)}"] if words else []
    is_hidden = sys.stdout.isatty() and bool(target.key) and target.key == config.api_key
    command = " ".join([f"{NAME}.py", "env", *([arguments.provider] if arguments.provider else [])])
    notes += ["The key is not shown on a terminal. To use this:", shell.use.format(command)] if is_hidden else []
    changes = client_environment(client, target, os.environ)
    print("\n".join(shell_lines(shell, changes, notes, target.key if is_hidden else "")))
    return EXIT_OK


def guess_target(client: Client, config: Config, url: str) -> Tuple[Target, List[str]]:
    """Where a client is to go when it is started later, and what is to be said of that: without `url`, where the
    gateway will be."""
    models = listed_models(Lifecycle(config, []), url) if url else {
        model.full_id: model.context_window for model in build_gateway(config, os.environ).models()}
    url = url or local_url(config.bind_address, config.port)
    try:
        return choose_target(client, config, url, models), []
    except NoModel as error:
        some = choose_target(client, config, url, models, next(iter(models), ""))
        return some._replace(model="", window=0), [str(error)]


def shell_lines(shell: Shell, changes: Mapping[str, Optional[str]], notes: Sequence[str], hidden: str) -> List[str]:
    """The lines that make a shell's environment so, with notes as comments and without the `hidden` text."""
    lines = [f"{shell.comment} {part}" for note in notes
             for part in textwrap.wrap(note, HELP_COLUMNS - 4, break_long_words=False, break_on_hyphens=False)]
    for name, value in changes.items():
        text = "***" if hidden and value == hidden else value
        lines.append(shell.unset.format(name) if text is None else shell.export.format(name, shell.quote(text)))
    return lines


# --- Set-up -----------------------------------------------------------------------------------------------------------


def shown_value(option: Option, value: Any) -> Any:
    """A configuration value for people to see."""
    value = list(value) if isinstance(value, tuple) else value
    return REDACTED if option.key == "apiKey" and value else json.loads(redact(json.dumps(value)))


def short_path(path: str) -> str:
    """A path with ~ for the home directory."""
    folder = home(os.environ)
    return "~" + path[len(folder):] if path.startswith(folder + os.sep) else path


def cut(text: str, width: int) -> str:
    """The text in so many columns; what is too long loses its middle."""
    if len(text) <= width:
        return text
    return text[:width - width // 2 - 1] + "…" + text[-(width // 2):]


def print_config(config: Config, as_json: bool) -> int:
    """The command show."""
    rows = [(option.key, shown_value(option, getattr(config, option.attribute)),
             short_path(config.origins.get(option.attribute, "default"))) for option in OPTIONS]
    if as_json:
        print(json.dumps({key: {"value": value, "from": source} for key, value, source in rows}, indent=2))
        return EXIT_OK
    for key, value, source in rows:
        text = value if isinstance(value, str) and value else json.dumps(value, ensure_ascii=False)
        print(f"{key:<25}{cut(text, 26):<27}{cut(source, 27)}")
    return EXIT_OK


class Finding(NamedTuple):
    """What is to say of a file: problems keep the gateway from starting or leave things out, warnings do not."""

    path: str
    is_there: bool
    problems: List[str]
    warnings: List[str]


def run_check(arguments: argparse.Namespace) -> int:
    """The command check: 0 when all is in order, 2 when there is a problem. Starts nothing and runs no command."""
    findings = check_files(os.environ, arguments)
    for finding in findings:
        state = "not there" if not finding.is_there else "problem" if finding.problems else "ok"
        print(f"{state:<11}{short_path(finding.path)}")
        for kind, texts in (("problem", finding.problems), ("warning", finding.warnings)):
            for text in texts:
                said = redact(text).replace(finding.path + ": ", "", 1)
                print(textwrap.fill(f"{kind}: {said}", HELP_COLUMNS, initial_indent=" " * 11,
                                    subsequent_indent=" " * 13, break_on_hyphens=False))
    return EXIT_CONFIG if any(finding.problems for finding in findings) else EXIT_OK


def check_files(environ: Mapping[str, str], arguments: argparse.Namespace) -> List[Finding]:
    """What is to say of each file that the gateway reads, and of all of them together."""
    extra = os.path.expanduser(arguments.config) if arguments.config else None
    findings = []
    for path in config_files(environ, extra):
        problems = said_problems(lambda: read_config_file(path, path == extra))
        findings.append(Finding(path, os.path.exists(path), problems, []))
    together: List[str] = []
    config = Config()
    if not any(finding.problems for finding in findings):
        try:
            config = load_config(environ, read_flags(arguments), extra)
        except ConfigError as error:
            together.append(str(error))
    agent = agent_dir(config, environ)
    models_path, auth_path = os.path.join(agent, "models.json"), os.path.join(agent, "auth.json")
    models = ModelsFile(dict(PROVIDERS), {}, [])
    problems = said_problems(lambda: read_models_json(models_path))
    models = models if problems else read_models_json(models_path)
    keys = Credentials(auth_path, environ)
    findings.append(Finding(models_path, os.path.exists(models_path), [*problems, *models.problems],
                            list(key_warnings(models, keys))))
    findings.append(check_auth_file(auth_path, models.providers, keys))
    catalogue = Catalogue(models.providers, models.custom)
    try:
        catalogue = catalogue_of(config, models)
    except ConfigError as error:
        together.append(str(error))
    warnings = list(name_warnings(config, catalogue))
    if together or warnings:
        findings.append(Finding("all together", True, together, warnings))
    return findings


def said_problems(read: Callable[[], Any]) -> List[str]:
    """What a reader of a file complains of."""
    try:
        read()
    except ConfigError as error:
        return [str(error)]
    return []


def check_auth_file(path: str, providers: Mapping[str, Provider], keys: Credentials) -> Finding:
    """What is to say of auth.json."""
    problems: List[str] = []
    warnings: List[str] = []
    entries: Dict[str, Any] = {}
    try:
        entries = read_object(path)
    except (ValueError, OSError) as error:
        problems.append(str(error) if isinstance(error, ValueError) else describe(error))
    if os.name == "posix" and os.path.exists(path) and os.stat(path).st_mode & 0o077:
        warnings.append(f"others can read it (mode {os.stat(path).st_mode & 0o777:04o}): chmod 600 {short_path(path)}")
    for name, entry in entries.items():
        fields, shown = as_dict(entry), header_text(name)[:60]
        if fields.get("type") not in ("api_key", "oauth"):
            problems.append(f'{shown}: "type" must be "api_key" or "oauth"')
            continue
        if name not in providers:
            warnings.append(f"{shown}: no provider has this name")
        value = fields.get("key") if fields["type"] == "api_key" else None
        if value is not None and not (isinstance(value, str) and resolves(keys, value, fields)):
            warnings.append(f"{shown}: the key resolves to nothing")
    return Finding(path, os.path.exists(path), problems, warnings)


def resolves(keys: Credentials, value: str, entry: Mapping[str, Any] = MappingProxyType({})) -> bool:
    """Whether a configured key is one, as far as that shows without running its command."""
    return value.startswith("!") or bool(keys.resolve(value, entry))


def key_warnings(models: ModelsFile, keys: Credentials) -> Iterator[str]:
    """Keys and headers in models.json that resolve to nothing."""
    for name, provider in models.providers.items():
        if provider.api_key and not resolves(keys, provider.api_key):
            yield f"providers.{name}.apiKey resolves to nothing"
        for header, value in provider.headers.items():
            if not resolves(keys, value):
                yield f"providers.{name}.headers.{header} resolves to nothing"


def name_warnings(config: Config, catalogue: Catalogue) -> Iterator[str]:
    """Names in the configuration that lead nowhere."""
    for name in config.pass_through:
        if name not in catalogue.providers:
            yield f'passThrough: there is no provider "{name}"'
    targets = [("defaultModel", config.default_model)] if config.default_model else []
    targets += [(f"modelMap.{key}", target) for key, value in config.model_map.items() for target in map_targets(value)]
    for key, target in targets:
        named, slash, _ = target.partition("/")
        own = key.partition(".")[2].rpartition(":")[0] or config.provider       # modelMap's provider:name
        try:
            catalogue.resolve(f"{own}/{target}" if own and not slash else target, lambda provider: True)
        except ModelNotFound:
            is_known = not slash or named in catalogue.providers
            yield f'{key}: no model "{target}"' + ("" if is_known else f'; there is no provider "{named}"')


class SetUp:
    """The command init: asks what is needed, and only then writes. Raises `ConfigError`, `LogInFailed`,
    `AuthFileError`."""

    SHOWN = 15                                  # models of a list

    def __init__(self, arguments: argparse.Namespace, terminal: Terminal) -> None:
        self._arguments = arguments
        self._terminal = terminal
        self.path = os.path.expanduser(arguments.config) if arguments.config else os.path.join(
            home(os.environ), ".pi", "agent", "pigateway.json")
        flags = read_flags(arguments)
        self._wanted = {name: flags.pop(name, "") for name in ("provider", "default_model")}
        self.config = self._load(flags)
        self.file = AuthFile(os.path.join(agent_dir(self.config, os.environ), "auth.json"))
        self._gateway = build_gateway(self.config, os.environ)
        self._entry: Optional[Dict[str, Any]] = None

    def _load(self, flags: Mapping[str, Any]) -> Config:
        try:
            return load_config(os.environ, flags)
        except ConfigError as error:            # the very file that is to be replaced
            if self.path in str(error):
                return Config(**flags)
            raise

    def run(self) -> int:
        """Returns the exit status."""
        self._may_replace()
        provider = self._pick_provider()
        if not self._gateway.is_usable(provider):
            self._get_credential(provider)
        model = self._pick_model(provider)
        client = self._pick_client()
        entry = self._entry
        if entry is not None:
            self.file.change(provider.name, lambda old: entry)
        write_private_file(self.path, render_config(provider.name, model).encode("utf-8"))
        self._say_next(provider, client)
        return EXIT_OK

    @property
    def _asks(self) -> bool:
        return not self._arguments.yes

    def _may_replace(self) -> None:
        if self._asks and not self._terminal.is_interactive:
            raise ConfigError("init asks questions, which needs a terminal; --yes asks none")
        if not os.path.exists(self.path) or self._arguments.force:
            return
        if not self._asks:
            raise LogInFailed(f"{self.path} is there already; --force replaces it")
        if not self._terminal.agrees(f"{short_path(self.path)} is there already, and would be replaced."):
            raise LogInFailed("nothing was changed")

    def _pick(self, question: str, names: Sequence[str], default: str) -> str:
        """One of the names, by number or name, or another name that was typed."""
        answer = self._terminal.ask(f"{question} [{default}] " if default else f"{question} ") or default
        numbered = {str(number): name for number, name in enumerate(names, 1)}
        return numbered.get(answer, answer)

    def _pick_provider(self) -> Provider:
        providers = {name: row for name, row in self._gateway.catalogue.providers.items() if name != DEMO}
        found = [name for name, row in providers.items() if self._gateway.is_usable(row)]
        name = self._wanted["provider"]
        if not name and self._wanted["default_model"].partition("/")[0] in providers:
            name = self._wanted["default_model"].partition("/")[0]
        if not name and self._asks:
            name = self._ask_provider(list(providers), found)
        name = name or (found[0] if found else "")
        if name not in providers:
            near = difflib.get_close_matches(name, providers, 1, 0.4)
            raise ConfigError(f'no provider "{redact(name)[:60]}"; did you mean "{near[0]}"?' if near else
                              "no provider has a key here: name one with --provider" if not name else
                              f'no provider "{redact(name)[:60]}"')
        return providers[name]

    def _ask_provider(self, names: Sequence[str], found: Sequence[str]) -> str:
        ordered = [*found, *(name for name in names if name not in found)]
        self._terminal.say("Where are your models? Providers that have a key or log-in here come first:\n"
                           if found else "Where are your models? No provider has a key or log-in here yet.\n")
        cells = [f"{number:>3} {name}{' *' if name in found else ''}" for number, name in enumerate(ordered, 1)]
        depth = -(-len(cells) // 2)
        for left, right in itertools.zip_longest(cells[:depth], cells[depth:], fillvalue=""):
            self._terminal.say(f"{left:<39}{right}".rstrip())
        return self._pick("\nProvider (number or name)?", ordered, ordered[0] if found else "")

    def _get_credential(self, provider: Provider) -> None:
        ways = {"variable": f"I set the variable {provider.env[-1]}"} if provider.env else {}
        ways.update({"key": "I type a key here; it is kept in auth.json"} if provider.env else {})
        ways.update({"login": f"I log in to {SUBSCRIPTIONS[provider.name].title}"} if provider.name in LOG_INS else {})
        if not self._asks or not ways:
            return                              # what is missing is said at the end
        for number, text in enumerate(ways.values(), 1):
            self._terminal.say(f"{number:>3} {text}")
        way = self._pick(f"How does {provider.name} know you?", list(ways), "1")
        if way not in ways:
            raise ConfigError(f"there is no answer {redact(way)[:20]!r}")
        if way == "key":
            key = self._terminal.ask_hidden(f"Key for {provider.name} (not shown): ")
            if not key.isascii() or not key.isprintable() or not key:
                raise ConfigError("that is no key: only printable ASCII characters can be sent in a header")
            self._entry = {"type": "api_key", "key": key}
        elif way == "login":
            self.file.check()                   # before it is all for nothing
            row = SUBSCRIPTIONS[provider.name]
            self._entry = obtain_log_in(row, self._terminal, self._arguments, self.config)

    def _pick_model(self, provider: Provider) -> str:
        """A name with its provider, "" for none."""
        names = sorted(self._gateway.catalogue.models_of(provider))
        name = self._wanted["default_model"]
        if not name and self._asks and names:
            for number, known in enumerate(names[:self.SHOWN], 1):
                self._terminal.say(f"{number:>3} {known}")
            self._terminal.say(f"    ... {len(names) - self.SHOWN} more" if len(names) > self.SHOWN else "")
            name = self._pick("Default model (number or name, empty for none)?", names, "")
        is_full = name.partition("/")[0] in self._gateway.catalogue.providers and name not in names
        return name if is_full or not name else f"{provider.name}/{name}"

    def _pick_client(self) -> str:
        names = [*LAUNCH_COMMANDS, "none"]
        name = self._arguments.client or ""
        if not name and self._asks:
            for number, known in enumerate(names, 1):
                self._terminal.say(f"{number:>3} {CLIENTS[known].title if known in CLIENTS else 'another, or none'}")
            name = self._pick("Which client do you use?", names, "1")
        name = CLIENT_ALIASES.get(name, name)
        if name not in names:
            raise ConfigError(f"no client {redact(name)[:60]!r}; there is {', '.join(names)}")
        return name

    def _say_next(self, provider: Provider, client: str) -> None:
        say = self._terminal.say
        say(f"\nWritten: {short_path(self.path)}" + (f", and the credential to {short_path(self.file.path)}"
                                                      if self._entry is not None else ""))
        if self._entry is None and not self._gateway.is_usable(provider):
            say(f"Still missing: a credential for {provider.name}. " + (
                f"Set {provider.env[-1]}." if provider.env else log_in_advice(provider.name)))
        config = f" --config {shlex.quote(self.path)}" if self._arguments.config else ""
        command = client if client in CLIENTS else "start"
        say(f"Next: {NAME}.py{config} {command}")


def render_config(provider: str, model: str) -> str:
    """A configuration file with comments, which only files of our own may have."""
    lines = [f"// Written by {NAME}.py init. Comments are allowed here. README.md has all keys;",
             f"// {NAME}.py show prints those in force.",
             "{", "  // Where names go that do not say a provider.", f'  "provider": {json.dumps(provider)},',
             "  // The model for requests that name none.",
             f'  "defaultModel": {json.dumps(model)},' if model else f'  // "defaultModel": "{provider}/...",',
             "  // What a client's own names stand for; a list is tried in turn.",
             '  "modelMap": {', '    // "claude-haiku-4-5": "provider/a-small-model"', "  }", "}"]
    return "\n".join(lines) + "\n"


def run_init(arguments: argparse.Namespace) -> int:
    """The command init. Returns the exit status."""
    try:
        return SetUp(arguments, Terminal()).run()
    except (LogInFailed, AuthFileError, GatewayError) as error:
        print(f"{NAME}: {redact(str(error))}", file=sys.stderr)
        return EXIT_FAILURE
    except KeyboardInterrupt:
        print(f"\n{NAME}: given up; nothing was changed", file=sys.stderr)
        return EXIT_INTERRUPTED


SET_UP: Mapping[str, Callable[[argparse.Namespace], int]] = {"init": run_init, "ui": run_init, "check": run_check}


# --- The extension for pi ---------------------------------------------------------------------------------------------


def install_extension(folder: str, force: bool = False) -> str:
    """Writes the pi extension into a folder and returns its path. The first line holds a checksum of the others: a file
    that differs from what was written there, because of an edit or another author, is replaced only with `force`.
    Raises `ConfigError`, OSError."""
    path = os.path.realpath(os.path.join(folder, f"{NAME}.ts"))
    values = {"__PYTHON__": sys.executable or "python3", "__PIGATEWAY__": os.path.abspath(__file__)}
    body = re.sub("__PYTHON__|__PIGATEWAY__", lambda match: json.dumps(values[match[0]]), PI_EXTENSION).encode("utf-8")
    with contextlib.suppress(FileNotFoundError):
        with open(path, "rb") as file:
            first, _, rest = file.read().partition(b"\n")
        if first != extension_mark(rest) and not force:
            raise ConfigError(f"{path} is not as {NAME} wrote it; --force replaces it")
    write_private_file(path, extension_mark(body) + b"\n" + body)
    return path


def extension_mark(body: bytes) -> bytes:
    """The first line of the extension."""
    return f"// Written by {NAME}.py pi-extension --install. {hashlib.sha256(body).hexdigest()[:16]}".encode("ascii")


def run_pi_extension(config: Config, arguments: argparse.Namespace) -> int:
    """The command pi-extension."""
    if not arguments.install:
        raise ConfigError(f"{NAME}.py pi-extension --install writes the extension into pi's folder")
    path = install_extension(os.path.join(agent_dir(config, os.environ), "extensions"), arguments.force)
    print(f"Written: {path}\nRestart pi, or type /reload there. /gateway:start, /gateway:stop and /gateway:status are its "
          "commands.")
    return EXIT_OK


PI_EXTENSION = r'''// pigateway inside pi: /gateway:start, /gateway:stop, /gateway:status, the same as tools, a footer.
// pigateway.py does the work in processes of its own, so the gateway goes on when pi ends. No build step.
import { execFile } from "node:child_process";
import type { ExtensionAPI, ExtensionContext } from "@earendil-works/pi-coding-agent";

const PYTHON: string = __PYTHON__;
const PIGATEWAY: string = __PIGATEWAY__;
const REFRESH_MS = 15_000;
const STATUS_TIMEOUT_MS = 10_000; // below REFRESH_MS, so that refreshes do not pile up
const ACTION_TIMEOUT_MS = 60_000; // starting waits until the gateway is healthy, stopping until it is gone

const ACTIONS = ["start", "stop", "status"] as const;
type Action = (typeof ACTIONS)[number];
type Status = { running?: boolean; pid?: number; url?: string; models?: number; problem?: string };

const ABOUT: Record<Action, string> = {
  start: "Start the local model gateway (pigateway), detached: it survives pi exit.",
  stop: "Stop the running local model gateway (pigateway).",
  status: "Show whether the local model gateway (pigateway) runs: its URL, pid and number of models.",
};

/** Runs pigateway.py, without a shell. Never rejects: `problem` says in one line what went wrong, or is empty. */
function call(args: string[], timeout: number, signal?: AbortSignal): Promise<{ stdout: string; problem: string }> {
  return new Promise<{ stdout: string; problem: string }>((resolve) => {
    execFile(PYTHON, [PIGATEWAY, ...args], { timeout, signal, windowsHide: true }, (error, stdout, stderr) => {
      let problem = error ? stderr.trim().split("\n").pop() || error.message.split("\n")[0] : "";
      if (error?.killed) problem = `no answer within ${timeout / 1000} s`;
      if (error?.code === "ENOENT") problem = `${PYTHON} not found; run pigateway.py pi-extension --install again`;
      resolve({ stdout, problem });
    });
  }).catch((error: Error) => ({ stdout: "", problem: error.message })); // refused before it ran
}

async function getStatus(signal?: AbortSignal): Promise<Status> {
  const { stdout, problem } = await call(["status", "--json"], STATUS_TIMEOUT_MS, signal); // exit code 1: not running
  try {
    const status = JSON.parse(stdout);
    if (typeof status.running === "boolean") return status;
  } catch {} // told below
  return { problem: problem || "its status is not understood" };
}

function describe({ running, url, models, problem }: Status): string {
  if (running === undefined) return `Gateway: unknown (${problem})`;
  if (!running) return "Gateway: stopped";
  const more = problem || (models === undefined ? "" : `${models} model${models === 1 ? "" : "s"}`);
  return `Gateway: running · ${url}` + (more && ` · ${more}`); // the problem can be that it does not answer
}

/** Runs `use`, if this session still has a user interface: the context of a session that is over throws. */
function withUI(ctx: ExtensionContext, use: (ui: ExtensionContext["ui"]) => void, otherwise?: () => void) {
  try {
    if (ctx.hasUI) use(ctx.ui);
    else otherwise?.();
  } catch {}
}

function footer(ctx: ExtensionContext, text: string | undefined) {
  withUI(ctx, (ui) => ui.setStatus("pigateway", text));
}

export default function (pi: ExtensionAPI) {
  let timer: ReturnType<typeof setInterval> | undefined;
  let newest = 0; // a slow answer must not replace a newer one in the footer

  async function refresh(ctx: ExtensionContext) {
    const mine = ++newest;
    const status = await getStatus();
    if (mine === newest) footer(ctx, describe(status));
  }

  async function run(action: Action, ctx: ExtensionContext, options: string[], signal?: AbortSignal) {
    if (action !== "status") footer(ctx, `Gateway: ${action}…`);
    const problem = action === "status" ? "" : (await call([action, ...options], ACTION_TIMEOUT_MS, signal)).problem;
    const status = await getStatus(signal);
    newest++;
    if (signal?.aborted) void refresh(ctx); // Escape: pi is not kept waiting
    else footer(ctx, describe(status));
    const text = describe(status) + (status.pid ? ` · pid ${status.pid}` : "");
    if (!problem) return { status, text, level: status.running === undefined ? "error" : "info" } as const;
    const isSo = status.running === (action === "start"); // as asked, though not by this call: it was so before
    return { status, text: `${problem} — ${text}`, level: isSo ? "warning" : "error" } as const;
  }

  for (const action of ACTIONS) {
    pi.registerCommand(`gateway:${action}`, {
      description: ABOUT[action],
      handler: async (args, ctx) => {
        const { text, level } = await run(action, ctx, action === "start" ? args.split(/\s+/).filter(Boolean) : []);
        withUI(ctx, (ui) => ui.notify(text, level), () => console.error(text)); // pi -p "/gateway:status"
      },
    });
  }

  pi.on("session_start", (_event, ctx) => {
    // Not while loading: pi does not start when two extensions load with tools of the same name, as pi-gateway's has.
    for (const action of ACTIONS) {
      pi.registerTool({
        name: `gateway_${action}`,
        label: `Gateway ${action}`,
        description: ABOUT[action] + (action === "status" ? "" : " Only when the user asks for it."),
        parameters: { type: "object", properties: {}, additionalProperties: false },
        executionMode: "sequential",
        execute: async (_id, _params, signal, _onUpdate, ctx) => {
          const { status, text, level } = await run(action, ctx, [], signal);
          if (level === "error") throw new Error(text); // pi's way to mark a tool result as failed
          return { content: [{ type: "text", text: `${text}\n${JSON.stringify(status)}` }], details: status };
        },
      });
    }
    withUI(ctx, () => {
      clearInterval(timer);
      timer = setInterval(() => void refresh(ctx), REFRESH_MS);
      timer.unref();
      void refresh(ctx); // not awaited: pi need not wait for it
    });
  });
  pi.on("session_shutdown", (_event, ctx) => {
    clearInterval(timer);
    newest++; // an answer that is under way comes too late
    footer(ctx, undefined);
  });
}
'''


# ======================================================================================================================
# §16 Catalogue data
# ======================================================================================================================
#
# Facts about models, one a line: id|context|output|flags|cost|levels|compat|protocol. flags: r reasons, i takes images.
# cost: USD per million tokens of input, output, cache read, cache write. levels: our level=the provider's word, "-" for
# a level it lacks. compat: name, !name or name=value over the provider's own. Long lists are discovered, not kept here.

MODELS: Dict[str, str] = {
"anthropic": """
claude-fable-5|1000000|128000|ri|10,50,1,12.5|off=- xhigh=xhigh max=max|forceAdaptiveThinking supportsMidConvoSystemMessages supportsMidConvoToolChanges
claude-fable-5-1|1000000|128000|ri|10,50,0.25,12.5|off=- xhigh=xhigh max=max|forceAdaptiveThinking supportsMidConvoEffort supportsMidConvoSystemMessages supportsMidConvoToolChanges
claude-fable-5-2|1000000|128000|ri|8,40,0.2,10|off=- xhigh=xhigh max=max|forceAdaptiveThinking supportsMidConvoEffort supportsMidConvoSystemMessages supportsMidConvoToolChanges
claude-haiku-4-5|200000|64000|ri|1,5,0.1,1.25
claude-haiku-4-5-20251001|200000|64000|ri|1,5,0.1,1.25
claude-haiku-5-5|1000000|128000|ri|0.1,0.5,0.01,0.125|minimal=- low=low medium=medium high=high xhigh=xhigh max=max|forceAdaptiveThinking !supportsTemperature supportsMidConvoEffort supportsMidConvoSystemMessages supportsMidConvoToolChanges
claude-opus-4-5|200000|64000|ri|5,25,0.5,6.25
claude-opus-4-5-20251101|200000|64000|ri|5,25,0.5,6.25
claude-opus-4-6|1000000|128000|ri|5,25,0.5,6.25|max=max|forceAdaptiveThinking
claude-opus-4-7|1000000|128000|ri|5,25,0.5,6.25|xhigh=xhigh max=max|forceAdaptiveThinking !supportsTemperature
claude-opus-4-8|1000000|128000|ri|5,25,0.5,6.25|xhigh=xhigh max=max|forceAdaptiveThinking !supportsTemperature supportsMidConvoSystemMessages supportsMidConvoToolChanges
claude-opus-5|1000000|128000|ri|5,25,0.5,6.25|xhigh=xhigh max=max|forceAdaptiveThinking !supportsTemperature supportsMidConvoEffort supportsMidConvoSystemMessages supportsMidConvoToolChanges
claude-opus-5-5|1000000|128000|ri|4,20,0.2,5|off=- minimal=- low=low medium=medium high=high xhigh=xhigh max=max|forceAdaptiveThinking !supportsTemperature supportsMidConvoEffort supportsMidConvoSystemMessages supportsMidConvoToolChanges
claude-sonnet-4-5|200000|64000|ri|3,15,0.3,3.75
claude-sonnet-4-5-20250929|200000|64000|ri|3,15,0.3,3.75
claude-sonnet-4-6|1000000|128000|ri|3,15,0.3,3.75|max=max|forceAdaptiveThinking
claude-sonnet-5|1000000|128000|ri|2,10,0.2,2.5|xhigh=xhigh max=max|forceAdaptiveThinking !supportsTemperature
claude-sonnet-5-5|1000000|128000|ri|2,10,0.1,2.5|off=- minimal=- low=low medium=medium high=high xhigh=xhigh max=max|forceAdaptiveThinking !supportsTemperature supportsMidConvoEffort supportsMidConvoSystemMessages supportsMidConvoToolChanges
""",
"openai": """
chat-latest|400000|128000|ri|5,30,0.5,0
gpt-4|8192|8192||30,60,0,0
gpt-4-turbo|128000|4096|i|10,30,0,0
gpt-4.1|1047576|32768|i|2,8,0.5,0
gpt-4.1-mini|1047576|32768|i|0.4,1.6,0.1,0
gpt-4.1-nano|1047576|32768|i|0.1,0.4,0.025,0
gpt-4o|128000|16384|i|2.5,10,1.25,0
gpt-4o-2024-05-13|128000|4096|i|5,15,0,0
gpt-4o-2024-08-06|128000|16384|i|2.5,10,1.25,0
gpt-4o-2024-11-20|128000|16384|i|2.5,10,1.25,0
gpt-4o-mini|128000|16384|i|0.15,0.6,0.075,0
gpt-5|400000|128000|ri|1.25,10,0.125,0|off=- minimal=minimal low=low medium=medium high=high xhigh=- max=-|supportsOpenAIGrammarTools
gpt-5-chat-latest|128000|16384|i|1.25,10,0.125,0|off=-|supportsOpenAIGrammarTools
gpt-5-mini|400000|128000|ri|0.25,2,0.025,0|off=- minimal=minimal low=low medium=medium high=high xhigh=- max=-|supportsOpenAIGrammarTools
gpt-5-nano|400000|128000|ri|0.05,0.4,0.005,0|off=- minimal=minimal low=low medium=medium high=high xhigh=- max=-|supportsOpenAIGrammarTools
gpt-5-pro|400000|128000|ri|15,120,0,0|off=- minimal=- low=- medium=- high=high xhigh=- max=-|supportsOpenAIGrammarTools
gpt-5.1|400000|128000|ri|1.25,10,0.125,0|off=none minimal=- low=low medium=medium high=high xhigh=- max=-|supportsOpenAIGrammarTools
gpt-5.2|400000|128000|ri|1.75,14,0.175,0|off=none minimal=- low=low medium=medium high=high xhigh=xhigh max=-|supportsOpenAIGrammarTools
gpt-5.2-pro|400000|128000|ri|21,168,0,0|off=- minimal=- low=- medium=medium high=high xhigh=xhigh max=-|supportsOpenAIGrammarTools
gpt-5.3-codex|400000|128000|ri|1.75,14,0.175,0|off=none minimal=- low=low medium=medium high=high xhigh=xhigh max=-|supportsOpenAIGrammarTools
gpt-5.3-codex-spark|128000|32000|ri|1.75,14,0.175,0|off=- minimal=- low=low medium=medium high=high xhigh=xhigh max=-|supportsOpenAIGrammarTools
gpt-5.4|272000|128000|ri|2.5,15,0.25,0|off=none minimal=- low=low medium=medium high=high xhigh=xhigh max=-|supportsOpenAIGrammarTools supportsMidConvoSystemMessages
gpt-5.4-mini|400000|128000|ri|0.75,4.5,0.075,0|off=none minimal=- low=low medium=medium high=high xhigh=xhigh max=-|supportsOpenAIGrammarTools supportsMidConvoSystemMessages
gpt-5.4-nano|400000|128000|ri|0.2,1.25,0.02,0|off=none minimal=- low=low medium=medium high=high xhigh=xhigh max=-|supportsOpenAIGrammarTools
gpt-5.4-pro|1050000|128000|ri|30,180,0,0|off=- minimal=- low=- medium=medium high=high xhigh=xhigh max=-|supportsOpenAIGrammarTools supportsMidConvoSystemMessages
gpt-5.5|272000|128000|ri|5,30,0.5,0|off=none minimal=- low=low medium=medium high=high xhigh=xhigh max=-|supportsOpenAIGrammarTools supportsMidConvoSystemMessages
gpt-5.5-pro|1050000|128000|ri|30,180,0,0|off=- minimal=- low=- medium=medium high=high xhigh=xhigh max=-|supportsOpenAIGrammarTools
gpt-5.6-cyber|400000|128000|ri|12.5,75,1.25,15.625|off=- minimal=- low=low medium=medium high=high xhigh=xhigh max=max|supportsOpenAIGrammarTools supportsExplicitPromptCacheMode
gpt-5.6-luna|272000|128000|ri|0.2,1.2,0.02,0.25|off=none minimal=- low=low medium=medium high=high xhigh=xhigh max=max|supportsOpenAIGrammarTools supportsAdditionalTools supportsToolSearch supportsMidConvoSystemMessages supportsExplicitPromptCacheMode
gpt-5.6-sol|272000|128000|ri|4,20,0.4,5|off=none minimal=- low=low medium=medium high=high xhigh=xhigh max=max|supportsOpenAIGrammarTools supportsAdditionalTools supportsToolSearch supportsMidConvoSystemMessages supportsExplicitPromptCacheMode
gpt-5.6-terra|272000|128000|ri|2,12,0.2,2.5|off=none minimal=- low=low medium=medium high=high xhigh=xhigh max=max|supportsOpenAIGrammarTools supportsAdditionalTools supportsToolSearch supportsMidConvoSystemMessages supportsExplicitPromptCacheMode
gpt-6-astra|272000|128000|ri|10,50,1,12.5|off=- minimal=- low=low medium=medium high=high xhigh=xhigh max=max|supportsOpenAIGrammarTools supportsAdditionalTools supportsToolSearch supportsMidConvoSystemMessages supportsExplicitPromptCacheMode supportsMidConvoEffort
gpt-6-luna|272000|128000|ri|0.1,0.5,0.01,0.125|off=none minimal=- low=low medium=medium high=high xhigh=xhigh max=max|supportsOpenAIGrammarTools supportsAdditionalTools supportsToolSearch supportsMidConvoSystemMessages supportsExplicitPromptCacheMode supportsMidConvoEffort
gpt-6-sol|272000|128000|ri|2,10,0.2,2.5|off=none minimal=- low=low medium=medium high=high xhigh=xhigh max=max|supportsOpenAIGrammarTools supportsAdditionalTools supportsToolSearch supportsMidConvoSystemMessages supportsExplicitPromptCacheMode supportsMidConvoEffort
gpt-6.1-sol|272000|128000|ri|2,10,0.1,2.5|off=- minimal=- low=low medium=medium high=high xhigh=xhigh max=max|supportsOpenAIGrammarTools supportsAdditionalTools supportsToolSearch supportsMidConvoSystemMessages supportsExplicitPromptCacheMode supportsMidConvoEffort
gpt-6.1-terra|272000|128000|ri|1,5,0.05,1.25|off=none minimal=- low=low medium=medium high=high xhigh=xhigh max=max|supportsOpenAIGrammarTools supportsAdditionalTools supportsToolSearch supportsMidConvoSystemMessages supportsExplicitPromptCacheMode supportsMidConvoEffort
gpt-daybreak-blue-latest|1050000|128000|ri|4,20,0.4,5|off=none minimal=- low=low medium=medium high=high xhigh=xhigh max=max|supportsExplicitPromptCacheMode
gpt-daybreak-red-latest|400000|128000|ri|12.5,75,1.25,15.625|off=none minimal=- low=low medium=medium high=high xhigh=xhigh max=max|supportsExplicitPromptCacheMode
o1|200000|100000|ri|15,60,7.5,0|off=- minimal=- low=low medium=medium high=high xhigh=- max=-
o1-pro|200000|100000|ri|150,600,0,0|off=- minimal=- low=low medium=medium high=high xhigh=- max=-
o3|200000|100000|ri|2,8,0.5,0|off=- minimal=- low=low medium=medium high=high xhigh=- max=-
o3-mini|200000|100000|r|1.1,4.4,0.55,0|off=- minimal=- low=low medium=medium high=high xhigh=- max=-
o3-pro|200000|100000|ri|20,80,0,0|off=- minimal=- low=low medium=medium high=high xhigh=- max=-
o4-mini|200000|100000|ri|1.1,4.4,0.275,0|off=- minimal=- low=low medium=medium high=high xhigh=- max=-
""",
"openai-codex": """
gpt-5.6-luna|272000|128000|ri|0.2,1.2,0.02,0.25|minimal=low xhigh=xhigh max=max
gpt-5.6-sol|272000|128000|ri|4,20,0.4,5|minimal=low xhigh=xhigh max=max
gpt-5.6-terra|272000|128000|ri|2,12,0.2,2.5|minimal=low xhigh=xhigh max=max
gpt-6-astra|272000|128000|ri|10,50,1,12.5|off=- minimal=low low=low medium=medium high=high xhigh=xhigh max=max
gpt-6-luna|272000|128000|ri|0.1,0.5,0.01,0.125|off=none minimal=low low=low medium=medium high=high xhigh=xhigh max=max
gpt-6-sol|272000|128000|ri|2,10,0.2,2.5|off=none minimal=low low=low medium=medium high=high xhigh=xhigh max=max
gpt-6.1-sol|500000|128000|ri|2,10,0.1,2.5|off=- minimal=low low=low medium=medium high=high xhigh=xhigh max=max
gpt-6.1-terra|500000|128000|ri|1,5,0.05,1.25|off=none minimal=low low=low medium=medium high=high xhigh=xhigh max=max
""",
"google": """
deep-research-max-preview-04-2026|1048576|65536|ri|2,12,0.2,0
deep-research-preview-04-2026|1048576|65536|ri|2,12,0.2,0
gemini-2.5-computer-use-preview-10-2025|128000|64000|ri|1.25,10,0,0
gemini-2.5-flash|1048576|65536|ri|0.3,2.5,0.03,0
gemini-2.5-flash-lite|1048576|65536|ri|0.1,0.4,0.01,0
gemini-2.5-pro|1048576|65536|ri|1.25,10,0.125,0
gemini-3-flash-preview|1048576|65536|ri|0.5,3,0.05,0|off=- minimal=minimal low=low medium=medium high=high xhigh=- max=-
gemini-3.1-flash-lite|1048576|65536|ri|0.25,1.5,0.025,0|off=- minimal=minimal low=low medium=medium high=high xhigh=- max=-
gemini-3.1-flash-lite-preview|1048576|65536|ri|0.25,1.5,0.025,0|off=- minimal=minimal low=low medium=medium high=high xhigh=- max=-
gemini-3.1-pro-preview|1048576|65536|ri|2,12,0.2,0|off=- minimal=- low=low medium=medium high=high xhigh=- max=-
gemini-3.1-pro-preview-customtools|1048576|65536|ri|2,12,0.2,0|off=- minimal=- low=low medium=medium high=high xhigh=- max=-
gemini-3.5-flash|1048576|65536|ri|1.5,9,0.15,0|off=- minimal=minimal low=low medium=medium high=high xhigh=- max=-
gemini-3.5-flash-lite|1048576|65536|ri|0.3,2.5,0.03,0|off=- minimal=minimal low=low medium=medium high=high xhigh=- max=-
gemini-3.6-flash|1048576|65536|ri|0.75,3.75,0.075,0|off=- minimal=minimal low=low medium=medium high=high xhigh=- max=-
gemini-3.7-flash|1048576|65536|ri|0.75,3.75,0.075,0|off=- minimal=- low=low medium=medium high=high xhigh=- max=-
gemini-3.8-flash|1048576|65536|ri|0.75,3.75,0.075,0|off=- minimal=- low=low medium=medium high=high xhigh=- max=-
gemini-4-argon|1048576|32768|ri|2,10,0.1,0|off=- minimal=- low=low medium=medium high=high xhigh=- max=-
gemini-flash-latest|1048576|65536|ri|1.5,9,0.15,0|off=- minimal=minimal low=low medium=medium high=high xhigh=- max=-
gemini-flash-lite-latest|1048576|65536|ri|0.25,1.5,0.025,0|off=- minimal=minimal low=low medium=medium high=high xhigh=- max=-
gemini-pro-latest|1048576|65536|ri|2,12,0.2,0|off=- minimal=- low=low medium=medium high=high xhigh=- max=-
gemini-robotics-er-2-preview|131072|65536|ri|1,5,0.1,0|off=- minimal=minimal low=low medium=medium high=high xhigh=- max=-
gemma-4-26b-a4b-it|262144|32768|ri||off=- minimal=MINIMAL low=- medium=- high=HIGH
gemma-4-31b-it|262144|32768|ri||off=- minimal=MINIMAL low=- medium=- high=HIGH
""",
"xai": """
grok-4.3|1000000|30000|ri|1.25,2.5,0.2,0|off=none minimal=- low=low medium=medium high=high xhigh=xhigh max=-
grok-4.5|500000|500000|ri|2,6,0.3,0|off=- minimal=- low=low medium=medium high=high xhigh=xhigh max=-
grok-4.6|500000|500000|ri|2,6,0.5,0|off=- minimal=- low=low medium=medium high=high xhigh=xhigh max=-
grok-4.7|500000|500000|ri|2,6,0.5,0|off=- minimal=- low=low medium=medium high=high xhigh=xhigh max=-
""",
"meta": """
muse-ember-1.0|1048576|524288|ri|0.1,0.5,0.004,0|off=- minimal=minimal low=low medium=medium high=high xhigh=xhigh max=max
muse-spark-1.1|1048576|131072|ri|1.25,4.25,0.15,0|off=- minimal=minimal low=low medium=medium high=high xhigh=xhigh max=-
muse-spark-1.2|1048576|131072|ri|1.25,4.25,0.15,0|off=- minimal=minimal low=low medium=medium high=high xhigh=xhigh max=-
muse-spark-1.2-contributor|1048576|131072|ri|0.1,0.2,0.002,0|off=- minimal=minimal low=low medium=medium high=high xhigh=xhigh max=-
muse-spark-1.3|1048576|131072|ri|1.25,4.25,0.15,0|off=- minimal=minimal low=low medium=medium high=high xhigh=xhigh max=max
muse-spark-1.3-contributor|1048576|131072|ri|0.1,0.2,0.002,0|off=- minimal=minimal low=low medium=medium high=high xhigh=xhigh max=-
muse-wonder-1.0|1048576|131072|ri|4,20,0.2,0|off=- minimal=minimal low=low medium=medium high=high xhigh=xhigh max=max
""",
"mistral": """
codestral-2508|256000|8192||0.3,0.9,0.03,0
codestral-latest|256000|4096||0.3,0.9,0.03,0
deepseek-v4-1-flash-1017|1048576|128000|r|0.3,1.2,0.007,0|off=none minimal=- low=low medium=- high=high xhigh=- max=max
devstral-2512|262144|262144||0.4,2,0.04,0
devstral-latest|262144|262144||0.4,2,0.04,0
devstral-medium-latest|262144|262144||0.4,2,0.04,0
glm-5-2|1048576|131072|r|1.4,4.4,0.14,0|off=none minimal=- low=- medium=- high=high xhigh=- max=max
labs-devstral-small-2512|256000|256000|i
labs-leanstral-1-5-1|262144|128000|ri||off=none minimal=- low=- medium=- high=high xhigh=- max=-
magistral-medium-latest|262144|16384|ri|2,5,0.2,0|off=none minimal=- low=- medium=- high=high xhigh=- max=-
ministral-14b-2512|262144|262144|i|0.2,0.2,0.02,0
ministral-3b-2512|131072|262144|i|0.1,0.1,0.01,0
ministral-3b-latest|131072|128000|i|0.1,0.1,0.01,0
ministral-8b-2512|262144|262144|i|0.15,0.15,0.015,0
ministral-8b-latest|262144|128000|i|0.15,0.15,0.015,0
mistral-large-2512|262144|262144|i|0.5,1.5,0.05,0
mistral-large-4|1048576|262144|ri|0.7,2.1,0.07,0|off=- minimal=- low=low medium=medium high=high xhigh=- max=-
mistral-large-4-0-8|1048576|262144|ri|0.7,2.1,0.07,0|off=- minimal=- low=low medium=medium high=high xhigh=- max=-
mistral-large-latest|262144|262144|i|0.5,1.5,0.05,0
mistral-medium-2505|131072|131072|i|0.4,2,0.04,0
mistral-medium-2508|262144|262144|i|0.4,2,0.04,0
mistral-medium-2604|262144|262144|ri|1.5,7.5,0.15,0|off=none minimal=- low=- medium=- high=high xhigh=- max=-
mistral-medium-3.5|262144|262144|ri|1.5,7.5,0,0|off=none minimal=- low=- medium=- high=high xhigh=- max=-
mistral-medium-latest|262144|262144|ri|1.5,7.5,0.15,0|off=none minimal=- low=- medium=- high=high xhigh=- max=-
mistral-small-2506|128000|16384|i|0.1,0.3,0.01,0
mistral-small-2603|262144|256000|ri|0.15,0.6,0.015,0|off=none minimal=- low=- medium=- high=high xhigh=- max=-
mistral-small-latest|262144|256000|ri|0.15,0.6,0.015,0|off=none minimal=- low=- medium=- high=high xhigh=- max=-
open-mistral-nemo|128000|128000||0.15,0.15,0.015,0
pixtral-12b|128000|128000|i|0.15,0.15,0.015,0
voxtral-small-2507|32768|32000||0.1,0.4,0.01,0
voxtral-small-latest|32768|32000||0.1,0.4,0.01,0
zai-glm-5-2|1048576|131072|r|1.4,4.4,0.14,0|off=none minimal=- low=- medium=- high=high xhigh=- max=max
zai-glm-5-3|1048576|131072|r|1.4,4.4,0.14,0|off=- minimal=- low=low medium=- high=high xhigh=- max=max
zai-glm-5-3-flash|1048576|131072|ri|0.15,0.5,0.03,0|off=- minimal=- low=low medium=- high=high xhigh=- max=max
""",
"deepseek": """
deepseek-flash|1000000|384000|ri|0.3,1.2,0.006,0|minimal=- low=low medium=- high=high max=max
deepseek-v4-pro|1000000|384000|r|1.32,3.96,0.044,0|minimal=- low=- medium=- high=high max=max|supportsMidConvoSystemMessages
""",
"moonshotai": """
kimi-k2.6|262144|262144|ri|0.95,4,0.16,0||!supportsReasoningEffort thinkingFormat=deepseek
kimi-k2.7-code|262144|262144|ri|0.95,4,0.19,0|off=-|!supportsReasoningEffort thinkingFormat=deepseek
kimi-k2.7-code-highspeed|262144|262144|ri|1.9,8,0.38,0|off=-|!supportsReasoningEffort thinkingFormat=deepseek
kimi-k3|1048576|1048576|ri|3,15,0.3,0|off=- minimal=- low=low medium=- high=high xhigh=- max=max|requiresReasoningContentOnAssistantMessages supportsMidConvoToolAdditions
kimi-k3.1-pro|1048576|1048576|ri|2,10,0.2,0|off=- minimal=- low=low medium=- high=high xhigh=- max=max|requiresReasoningContentOnAssistantMessages supportsMidConvoToolAdditions
kimi-k3.1-pro-highspeed|1048576|1048576|ri|4,20,0.2,0|off=- minimal=- low=low medium=- high=high xhigh=- max=max|requiresReasoningContentOnAssistantMessages supportsMidConvoToolAdditions
""",
"moonshotai-cn": """
kimi-k2.6|262144|262144|ri|0.9711,4.0337,0.1643,0||!supportsReasoningEffort thinkingFormat=deepseek
kimi-k2.7-code|262144|262144|ri|0.9711,4.0337,0.1942,0|off=-|!supportsReasoningEffort thinkingFormat=deepseek
kimi-k2.7-code-highspeed|262144|262144|ri|1.9421,8.0673,0.3884,0|off=-|!supportsReasoningEffort thinkingFormat=deepseek
kimi-k3|1048576|1048576|ri|3,15,0.3,0|off=- minimal=- low=low medium=- high=high xhigh=- max=max|requiresReasoningContentOnAssistantMessages supportsMidConvoToolAdditions
kimi-k3.1-pro|1048576|1048576|ri|1.9437,10.1671,0.1944,0|off=- minimal=- low=low medium=- high=high xhigh=- max=max|requiresReasoningContentOnAssistantMessages supportsMidConvoToolAdditions
kimi-k3.1-pro-highspeed|1048576|1048576|ri|3.8874,20.3342,0.1944,0|off=- minimal=- low=low medium=- high=high xhigh=- max=max|requiresReasoningContentOnAssistantMessages supportsMidConvoToolAdditions
""",
"kimi-coding": """
k3|1048576|131072|ri|3,15,0.3,0|off=- minimal=- low=low medium=- high=high xhigh=- max=max|requiresReasoningContentOnAssistantMessages supportsMidConvoToolAdditions
k3-256k|262144|131072|ri|3,15,0.3,0|off=- minimal=- low=low medium=- high=high xhigh=- max=max|requiresReasoningContentOnAssistantMessages supportsMidConvoToolAdditions
k3.1-pro|1048576|131072|ri|2,10,0.2,0|off=- minimal=- low=low medium=- high=high xhigh=- max=max|requiresReasoningContentOnAssistantMessages supportsMidConvoToolAdditions
k3.1-pro-highspeed|1048576|131072|ri|4,20,0.2,0|off=- minimal=- low=low medium=- high=high xhigh=- max=max|requiresReasoningContentOnAssistantMessages supportsMidConvoToolAdditions
kimi-for-coding|1048576|32768|ri|0.95,4,0.19,0|off=- minimal=- low=low medium=- high=high xhigh=- max=max|requiresReasoningContentOnAssistantMessages supportsMidConvoToolAdditions
kimi-for-coding-highspeed|262144|32768|ri|1.9,8,0.38,0|off=-|!supportsReasoningEffort thinkingFormat=deepseek
""",
"zai": """
glm-4.7|204800|131072|r|0.6,2.2,0.11,0||!supportsReasoningEffort
glm-5-turbo|200000|131072|r|1.2,4,0.24,0||!supportsReasoningEffort
glm-5.2|1000000|131072|r|1.4,4.4,0.26,0|off=none minimal=- low=- medium=- high=high xhigh=- max=max
glm-5.2-highspeed|1000000|131072|r||off=none minimal=- low=- medium=- high=high xhigh=- max=max
glm-5.3|1000000|131072|r|1.4,4.4,0.26,0|off=- minimal=- low=low medium=- high=high xhigh=- max=max
glm-5.3-flash|1000000|131072|ri|0.15,0.5,0.03,0|off=- minimal=- low=low medium=- high=high xhigh=- max=max
glm-5.3-highspeed|1000000|131072|r||off=- minimal=- low=low medium=- high=high xhigh=- max=max
""",
"zai-coding-cn": """
glm-4.6v|128000|32768|ri|0.3,0.9,0.05,0||!supportsReasoningEffort
glm-5.3|1000000|131072|r|1.4,4.4,0.26,0|off=- minimal=- low=low medium=- high=high xhigh=- max=max
glm-5.3-flash|1000000|131072|ri|0.15,0.5,0.03,0|off=- minimal=- low=low medium=- high=high xhigh=- max=max
glm-5.3-highspeed|1000000|131072|r||off=- minimal=- low=low medium=- high=high xhigh=- max=max
""",
"minimax": """
MiniMax-M2.7|204800|131072|r|0.3,1.2,0.06,0.375
MiniMax-M2.7-highspeed|204800|131072|r|0.6,2.4,0.06,0.375
MiniMax-M3|1000000|524288|ri|0.3,1.2,0.06,0
MiniMax-M3.1-Flash|1000000|524288|ri|0.15,0.6,0.015,0|off=- minimal=- low=low medium=medium high=high xhigh=xhigh max=max|forceAdaptiveThinking
""",
"minimax-cn": """
MiniMax-M2.7|204800|131072|r|0.3137,1.2549,0.0627,0.3922
MiniMax-M2.7-highspeed|204800|131072|r|0.6275,2.5098,0.0627,0.3922
MiniMax-M3|1000000|524288|ri|0.3137,1.2549,0.0627,0
MiniMax-M3.1-Flash|1000000|524288|ri|0.1494,0.5976,0.0149,0|off=- minimal=- low=low medium=medium high=high xhigh=xhigh max=max|forceAdaptiveThinking
""",
"qwen-token-plan": """
deepseek-v3.2|131072|65536|r|||!supportsReasoningEffort
deepseek-v4-flash|1000000|384000|r||off=- minimal=- low=- medium=- high=high xhigh=- max=max
deepseek-v4-flash-0731|1000000|384000|r||off=- minimal=- low=- medium=- high=high xhigh=- max=max
deepseek-v4-pro|1000000|384000|r||off=- minimal=- low=- medium=- high=high xhigh=- max=max
deepseek-v4-pro-0813|1000000|384000|r||off=- minimal=- low=- medium=- high=high xhigh=- max=max
deepseek-v4.1-flash|1000000|384000|ri||off=- minimal=- low=low medium=- high=high xhigh=- max=max
deepseek-v4.1-flash-1017|1000000|384000|ri||off=- minimal=- low=low medium=- high=high xhigh=- max=max
glm-5|202752|16384|r||minimal=- low=- medium=- high=high xhigh=- max=max
glm-5.1|202752|128000|r||minimal=- low=- medium=- high=high xhigh=- max=max
glm-5.2|1000000|131072|r||off=- minimal=- low=- medium=- high=high xhigh=- max=max
glm-5.3|1000000|131072|r||off=- minimal=- low=low medium=- high=high xhigh=- max=max
kimi-k2.5|262144|98304|ri|||!supportsReasoningEffort
kimi-k2.6|262144|262144|ri|||!supportsReasoningEffort
kimi-k2.7-code|262144|262144|ri|||!supportsReasoningEffort
MiniMax-M2.5|196608|32768|r|||!supportsReasoningEffort
qwen3.6-flash|1000000|65536|ri|||!supportsReasoningEffort
qwen3.6-plus|1000000|65536|ri|||!supportsReasoningEffort
qwen3.7-max|1000000|131072|r|||!supportsReasoningEffort
qwen3.7-plus|1000000|65536|ri|||!supportsReasoningEffort
qwen3.8-flash|1000000|131072|ri||off=- minimal=- low=low medium=medium high=- xhigh=xhigh max=-
qwen3.8-max|1000000|131072|ri||off=- minimal=- low=low medium=medium high=- xhigh=xhigh max=-
""",
"qwen-token-plan-individual": """
deepseek-v4-flash-0731|1000000|384000|r||off=- minimal=- low=- medium=- high=high xhigh=- max=max
deepseek-v4-pro|1000000|384000|r||off=- minimal=- low=- medium=- high=high xhigh=- max=max
deepseek-v4-pro-0813|1000000|384000|r||off=- minimal=- low=- medium=- high=high xhigh=- max=max
glm-5.2|1000000|131072|r||off=- minimal=- low=- medium=- high=high xhigh=- max=max
glm-5.3|1000000|131072|r||off=- minimal=- low=low medium=- high=high xhigh=- max=max
qwen3.6-flash|1000000|65536|ri|||!supportsReasoningEffort
qwen3.7-max|1000000|131072|r|||!supportsReasoningEffort
qwen3.7-plus|1000000|65536|ri|||!supportsReasoningEffort
qwen3.8-flash|1000000|131072|ri||off=- minimal=- low=low medium=medium high=- xhigh=xhigh max=-
qwen3.8-max|1000000|131072|ri||off=- minimal=- low=low medium=medium high=- xhigh=xhigh max=-
""",
"xiaomi": """
mimo-v2.6-flash|1048576|131072|ri|0.14,0.28,0.0028,0|off=off minimal=- low=- medium=- high=high xhigh=- max=-
mimo-v2.6-pro|1048576|131072|ri|0.435,0.87,0.0036,0|off=off minimal=- low=- medium=- high=high xhigh=- max=-
mimo-v2.6-pro-ultraspeed|1048576|131072|ri|4.35,8.7,0.036,0|off=off minimal=- low=- medium=- high=high xhigh=- max=-
""",
"xiaomi-token-plan-ams": """
mimo-v2.6-flash|1048576|131072|ri||off=off minimal=- low=- medium=- high=high xhigh=- max=-
mimo-v2.6-pro|1048576|131072|ri||off=off minimal=- low=- medium=- high=high xhigh=- max=-
""",
"ant-ling": """
Ling-2.6-1T|262144|65536||0.06,0.25,0,0
Ling-2.6-flash|262144|65536||0.01,0.02,0,0
Ring-2.6-1T|262144|65536|r|0.06,0.25,0,0|off=- minimal=- low=- medium=- high=high xhigh=xhigh
""",
"groq": """
llama-3.1-8b-instant|131072|131072||0.05,0.08,0,0
llama-3.3-70b-versatile|131072|32768||0.59,0.79,0,0
openai/gpt-oss-120b|131072|65536|r|0.15,0.6,0.075,0|off=- minimal=- low=low medium=medium high=high xhigh=- max=-
openai/gpt-oss-20b|131072|65536|r|0.075,0.3,0.0375,0|off=- minimal=- low=low medium=medium high=high xhigh=- max=-
openai/gpt-oss-safeguard-20b|131072|65536|r|0.075,0.3,0.0375,0|off=- minimal=- low=low medium=medium high=high xhigh=- max=-
qwen/qwen3.6-27b|131072|16384|ri|0.6,3,0.3,0|off=none minimal=- low=- medium=- high=default xhigh=- max=-
qwen/qwen3.8-27b|131072|16384|ri|0.8,4,0,0|off=none minimal=- low=low medium=medium high=high xhigh=- max=-
""",
"cerebras": """
gpt-oss-120b|131072|40960|r|0.35,0.75,0.35,0|off=- minimal=- low=low medium=medium high=high xhigh=- max=-
qwen-3.8-27b|131072|40960|ri|0.99,1.49,0.99,0|off=none minimal=- low=low medium=medium high=high xhigh=- max=-
""",
"together": """
deepseek-ai/DeepSeek-V4-Pro-0813|1048576|384000|r|1.32,3.96,0.13,0|minimal=- low=- medium=- high=high xhigh=-|supportsReasoningEffort
deepseek-ai/DeepSeek-V4.1-Flash|1048576|384000|ri|0.3,1.2,0.006,0|minimal=- low=- medium=-
meta-models/Muse-Spark-Open-816B-A42B|1048576|131072|ri|1.25,4.25,0.15,0|minimal=- low=- medium=-
MiniMaxAI/MiniMax-M3|524288|524288|ri|0.3,1.2,0.06,0|minimal=- low=- medium=-
moonshotai/Kimi-K3|1048576|131072|ri|3,15,0.3,0|minimal=- low=- medium=-
moonshotai/Kimi-K3.1-Pro|1048576|131072|ri|2,10,0.2,0|minimal=- low=- medium=-
nvidia/NVIDIA-Nemotron-3.5-Super-VL|262144|262144|ri|0.15,0.5,0.02,0|minimal=- low=- medium=-
openai/gpt-oss-120b|131072|131072|r|0.15,0.6,0,0|off=- minimal=- low=low medium=medium high=high xhigh=- max=-|supportsReasoningEffort thinkingFormat=openai
Qwen/Qwen3.5-9B|262144|65536|ri|0.17,0.25,0,0|minimal=- low=- medium=-
Qwen/Qwen3.6-Plus|1000000|65536|r|0.5,3,0,0|minimal=- low=- medium=-
Qwen/Qwen3.7-Max|1000000|131072|r|2.5,7.5,0.5,0|minimal=- low=- medium=-
reflection/Beam-1.0-501B-A23B|1048576|131072|r|0.4,1.2,0.04,0|minimal=- low=- medium=-
thinkingmachines/Inkling|524288|131072|ri|1,4.05,0.17,0|minimal=- low=- medium=-
zai-org/GLM-5.2|1048575|164000|r|1.4,4.4,0.26,0|minimal=- low=- medium=-
zai-org/GLM-5.3|1048575|262144|r|1.4,4.4,0.26,0|minimal=- low=- medium=-
zai-org/GLM-5.3-Flash|1048575|400000|ri|0.15,0.5,0.03,0|minimal=- low=- medium=-
""",
"fireworks": """
accounts/fireworks/models/deepseek-v4p1-flash|1000000|384000|ri|0.3,1.2,0.006,0|off=none minimal=- low=low medium=- high=high xhigh=- max=max||anthropic-messages
accounts/fireworks/models/deepseek-v4p1-flash-1017|1000000|384000|ri|0.3,1.2,0.006,0|off=none minimal=- low=low medium=- high=high xhigh=- max=max||anthropic-messages
accounts/fireworks/models/ember-1|1048576|131072|ri|3,15,0.3,0|off=none minimal=- low=low medium=medium high=high xhigh=- max=max||anthropic-messages
accounts/fireworks/models/minimax-m3|512000|512000|r|0.3,1.2,0.06,0|off=- minimal=- low=low medium=medium high=high xhigh=- max=-||anthropic-messages
accounts/fireworks/models/minimax-m3p1-flash|1000000|512000|ri|0.15,0.6,0.015,0|off=- minimal=- low=low medium=medium high=high xhigh=xhigh max=max||anthropic-messages
accounts/fireworks/models/muse-spark-open|1048576|131072|ri|1.25,4.25,0.15,0|off=- minimal=- low=low medium=medium high=high xhigh=xhigh max=-||anthropic-messages
accounts/fireworks/models/qwen3p8-2p4t-a95b|262144|131072|r|2,6,0.25,0|off=none minimal=- low=low medium=medium high=- xhigh=xhigh max=-||anthropic-messages
accounts/fireworks/models/qwen3p8-max|262144|131072|ri|2,6,0.25,0|off=none minimal=- low=low medium=medium high=- xhigh=xhigh max=-||anthropic-messages
accounts/fireworks/routers/deepseek-flash-latest|1000000|384000|ri|0.3,1.2,0.006,0|off=none minimal=- low=low medium=- high=high xhigh=- max=max||anthropic-messages
accounts/fireworks/routers/deepseek-v4p1-flash-1017-spot|1000000|384000|ri|0.21,0.84,0.0042,0|off=none minimal=- low=low medium=- high=high xhigh=- max=max||anthropic-messages
accounts/fireworks/routers/deepseek-v4p1-flash-1017-ultrafast|1000000|384000|ri|2.4,9.6,0.048,0|off=none minimal=- low=low medium=- high=high xhigh=- max=max||anthropic-messages
accounts/fireworks/routers/deepseek-v4p1-flash-spot|1000000|384000|ri|0.21,0.84,0.0042,0|off=none minimal=- low=low medium=- high=high xhigh=- max=max||anthropic-messages
accounts/fireworks/routers/kimi-fast-latest|1048576|131072|ri|4.5,22.5,0.45,0|off=none minimal=- low=low medium=medium high=high xhigh=- max=max||anthropic-messages
accounts/fireworks/routers/kimi-latest|1048576|131072|ri|3,15,0.3,0|off=none minimal=- low=low medium=medium high=high xhigh=- max=max||anthropic-messages
accounts/fireworks/routers/minimax-latest|512000|512000|r|0.3,1.2,0.06,0|off=- minimal=- low=low medium=medium high=high xhigh=- max=-||anthropic-messages
accounts/fireworks/routers/qwen-max-latest|262144|131072|ri|2,6,0.25,0|off=none minimal=- low=low medium=medium high=- xhigh=xhigh max=-||anthropic-messages
accounts/fireworks/models/glm-5p3|1048573|262144|r|1.4,4.4,0.26,0|off=- minimal=- low=low medium=- high=high xhigh=- max=max
accounts/fireworks/models/glm-5p3-flash|1048573|131072|ri|0.15,0.5,0.03,0|off=- minimal=- low=low medium=- high=high xhigh=- max=max
accounts/fireworks/models/kimi-k3|1048576|131072|ri|3,15,0.3,0|off=- minimal=- low=low medium=- high=high xhigh=- max=max|requiresReasoningContentOnAssistantMessages supportsMidConvoSystemMessages supportsMidConvoToolAdditions
accounts/fireworks/models/kimi-k3p1-pro|1048576|131072|ri|2,10,0.2,0|off=- minimal=- low=low medium=- high=high xhigh=- max=max|requiresReasoningContentOnAssistantMessages supportsMidConvoSystemMessages supportsMidConvoToolAdditions
accounts/fireworks/routers/glm-5p3-fast|1048572|262144|r|2.1,6.6,0.39,0|off=- minimal=- low=low medium=- high=high xhigh=- max=max
accounts/fireworks/routers/glm-5p3-spot|1048573|262144|r|0.98,3.08,0.182,0|off=- minimal=- low=low medium=- high=high xhigh=- max=max
accounts/fireworks/routers/glm-fast-latest|1048572|262144|r|2.1,6.6,0.39,0|off=- minimal=- low=low medium=- high=high xhigh=- max=max
accounts/fireworks/routers/glm-flash-latest|1048573|131072|ri|0.15,0.5,0.03,0|off=- minimal=- low=low medium=- high=high xhigh=- max=max
accounts/fireworks/routers/glm-latest|1048573|262144|r|1.4,4.4,0.26,0|off=- minimal=- low=low medium=- high=high xhigh=- max=max
accounts/fireworks/routers/kimi-k3-fast|1048576|131072|ri|4.5,22.5,0.45,0|off=- minimal=- low=low medium=- high=high xhigh=- max=max|requiresReasoningContentOnAssistantMessages supportsMidConvoSystemMessages supportsMidConvoToolAdditions
accounts/fireworks/routers/kimi-k3-spot|1048576|131072|ri|2.1,10.5,0.21,0|off=- minimal=- low=low medium=- high=high xhigh=- max=max|requiresReasoningContentOnAssistantMessages supportsMidConvoSystemMessages supportsMidConvoToolAdditions
""",
"baseten": """
deepseek-ai/DeepSeek-V4-Flash-0731|1048576|384000|r|0.13,0.26,0.028,0|off=none minimal=- low=low medium=- high=high xhigh=- max=max
deepseek-ai/DeepSeek-V4-Pro-0813|1048576|262144|r|1.32,3.96,0.132,0|off=none minimal=- low=low medium=- high=high xhigh=- max=max
deepseek-ai/DeepSeek-V4.1-Flash|1048576|32768|ri|0.3,1.2,0.007,0|off=none minimal=- low=- medium=- high=high xhigh=- max=max
deepseek-ai/DeepSeek-V4.1-Flash-1017|1048576|262144|ri|0.3,1.2,0.007,0|off=none minimal=- low=low medium=medium high=high xhigh=- max=max
deepseek-ai/DeepSeek-V4.1-Flash-1017-Fast|1048576|262144|ri|0.6,2.4,0.014,0|off=none minimal=- low=low medium=medium high=high xhigh=- max=max
deepseek-ai/DeepSeek-V4.1-Flash-Fast|1048576|32768|ri|0.6,2.4,0.014,0|off=none minimal=- low=- medium=- high=high xhigh=- max=max
moonshotai/Kimi-K3|1048576|262144|ri|3,15,0.3,0|off=none minimal=- low=low medium=- high=high xhigh=- max=max
moonshotai/Kimi-K3.1-Pro|1000000|262144|ri|2,10,0.2,0||!supportsReasoningEffort
nvidia/NVIDIA-Nemotron-3-Ultra-550B-A55B|202800|202800|r|0.6,2.4,0.12,0|off=none minimal=- low=- medium=- high=high xhigh=- max=-
openai/gpt-oss-120b|128072|128072|r|0.1,0.5,0.1,0|off=none minimal=minimal low=low medium=medium high=high xhigh=xhigh max=max
zai-org/GLM-5.2|1048576|262144|r|1.4,4.4,0.14,0|off=none minimal=- low=- medium=- high=high xhigh=- max=max|thinkingFormat=baseten chatTemplateArgs={"enable_thinking":{"$var":"thinking.enabled"}}
zai-org/GLM-5.2-Fast|1048576|262144|r|2.1,6.6,0.21,0|off=none minimal=- low=- medium=- high=high xhigh=- max=max|thinkingFormat=baseten chatTemplateArgs={"enable_thinking":{"$var":"thinking.enabled"}}
zai-org/GLM-5.3|1048576|262144|ri|1.4,4.4,0.14,0|off=- minimal=- low=low medium=- high=high xhigh=- max=max
zai-org/GLM-5.3-Fast|1048576|262144|ri|2.1,6.6,0.21,0|off=- minimal=- low=low medium=- high=high xhigh=- max=max
zai-org/GLM-5.3-Flash|1048576|131072|ri|0.15,0.5,0.03,0|off=- minimal=- low=low medium=- high=high xhigh=- max=max
""",
"nvidia": """
deepseek-ai/deepseek-v4.1-flash|1000000|384000|ri||minimal=- low=- medium=- high=high max=max|requiresReasoningContentOnAssistantMessages thinkingFormat=deepseek
google/diffusiongemma-26b-a4b-it|250000|32768|ri
google/gemma-3-12b-it|131072|16384|i
google/gemma-3-4b-it|131072|16384|i
meta/llama-3.2-90b-vision-instruct|128000|8192|i
meta/muse-glimmer-30b|131072|131072|ri
minimaxai/minimax-m3.1-flash|262144|262144|ri
mistralai/mistral-7b-instruct-v0.3|65536|65536
moonshotai/kimi-k2.6|262144|262144|ri
nvidia/cosmos-reason2-8b|131072|16384|ri
nvidia/llama-3.1-nemotron-70b-instruct|128000|8192
nvidia/llama-3.1-nemotron-ultra-253b-v1|128000|16384|r
nvidia/nemotron-3-nano-omni-30b-a3b-reasoning|256000|65536|ri
nvidia/nemotron-3-ultra-550b-a55b|1000000|65536|r
nvidia/nemotron-3.5-lightning-30b-a3b|262144|262144|r
nvidia/nemotron-3.5-super-vl-120b-a12b|1048576|8192|ri
openai/gpt-oss-20b|131072|32768|r
poolside/laguna-xs-2.1|262144|16384|r
stepfun-ai/step-5-preview|1048576|1048576|ri
z-ai/glm-5.3-flash|1000000|131072|ri
""",
"cloudflare-workers-ai": """
@cf/deepseek-ai/deepseek-v4-flash-0731|1048576|1048576|r|0.44,1.32,0.014,0|minimal=- low=- medium=- high=high max=max|requiresReasoningContentOnAssistantMessages thinkingFormat=deepseek
@cf/deepseek-ai/deepseek-v4-pro-0813|1048576|1048576|r|1.32,3.96,0.044,0|minimal=- low=- medium=- high=high max=max|requiresReasoningContentOnAssistantMessages thinkingFormat=deepseek
@cf/deepseek-ai/deepseek-v4.1-flash-1017|1048576|1048576|ri|0.3,1.2,0.006,0|minimal=- low=- medium=- high=high max=max|requiresReasoningContentOnAssistantMessages thinkingFormat=deepseek
@cf/google/gemma-4-26b-a4b-it|256000|16384|ri|0.1,0.3,0.05,0
@cf/ibm-granite/granite-4.0-h-micro|131000|131000||0.017,0.112,0,0
@cf/meta/llama-3.3-70b-instruct-fp8-fast|24000|24000||0.293,2.253,0,0
@cf/meta/llama-4-scout-17b-16e-instruct|131000|16384|i|0.27,0.85,0,0
@cf/mistralai/mistral-small-3.1-24b-instruct|128000|128000|i|0.351,0.555,0,0
@cf/moonshotai/kimi-k2.6|262144|256000|ri|0.95,4,0.16,0|off=none minimal=- low=- medium=- high=high xhigh=- max=-
@cf/moonshotai/kimi-k2.7-code|262144|262144|ri|0.95,4,0.19,0
@cf/nvidia/nemotron-3-120b-a12b|256000|256000|r|0.5,1.5,0,0|off=- minimal=- low=low medium=- high=high xhigh=- max=-
@cf/openai/gpt-oss-120b|128000|16384|r|0.35,0.75,0,0|off=- minimal=- low=low medium=medium high=high xhigh=- max=-
@cf/openai/gpt-oss-20b|128000|16384|r|0.2,0.3,0,0|off=- minimal=- low=low medium=medium high=high xhigh=- max=-
@cf/qwen/qwen3-30b-a3b-fp8|32768|32768|r|0.0509,0.335,0,0
@cf/qwen/qwen3.8-27b|262144|262144|ri|0.45,3.2,0.05,0|off=- minimal=- low=low medium=medium high=- xhigh=xhigh max=-
@cf/zai-org/glm-4.7-flash|131072|131072|r|0.0605,0.4,0,0
@cf/zai-org/glm-5.2|262144|256000|r|1.4,4.4,0.26,0|off=none minimal=- low=- medium=- high=high xhigh=- max=max
@cf/zai-org/glm-5.3|1048576|1048576|r|1.4,4.4,0.26,0|off=- minimal=- low=low medium=- high=high xhigh=- max=max
@cf/zai-org/glm-5.3-flash|1048576|1048576|ri|0.15,0.5,0.03,0|off=- minimal=- low=low medium=- high=high xhigh=- max=max
""",
"cloudflare-ai-gateway": """
claude-fable-5|1000000|128000|ri|10,50,1,12.5|off=- xhigh=xhigh max=max|forceAdaptiveThinking|anthropic-messages
claude-fable-5-1|1000000|128000|ri|10,50,0.25,12.5|off=- xhigh=xhigh max=max|forceAdaptiveThinking|anthropic-messages
claude-haiku-4-5|200000|64000|ri|1,5,0.1,1.25|||anthropic-messages
claude-haiku-5-5|1000000|128000|ri|0.1,0.5,0.01,0.125|xhigh=xhigh max=max|forceAdaptiveThinking !supportsTemperature|anthropic-messages
claude-opus-4-5|200000|64000|ri|5,25,0.5,6.25|||anthropic-messages
claude-opus-4-6|1000000|128000|ri|5,25,0.5,6.25|max=max|forceAdaptiveThinking|anthropic-messages
claude-opus-4-7|1000000|128000|ri|5,25,0.5,6.25|xhigh=xhigh max=max|forceAdaptiveThinking !supportsTemperature|anthropic-messages
claude-opus-4-8|1000000|128000|ri|5,25,0.5,6.25|xhigh=xhigh max=max|forceAdaptiveThinking !supportsTemperature|anthropic-messages
claude-opus-5|1000000|128000|ri|5,25,0.5,6.25|xhigh=xhigh max=max|forceAdaptiveThinking !supportsTemperature|anthropic-messages
claude-opus-5-5|1000000|128000|ri|4,20,0.2,5|xhigh=xhigh max=max|forceAdaptiveThinking !supportsTemperature|anthropic-messages
claude-sonnet-4-5|200000|64000|ri|3,15,0.3,3.75|||anthropic-messages
claude-sonnet-4-6|1000000|128000|ri|3,15,0.3,3.75|max=max|forceAdaptiveThinking|anthropic-messages
claude-sonnet-5|1000000|128000|ri|2,10,0.2,2.5|xhigh=xhigh max=max|forceAdaptiveThinking !supportsTemperature|anthropic-messages
claude-sonnet-5-5|1000000|128000|ri|2,10,0.1,2.5|xhigh=xhigh max=max|forceAdaptiveThinking !supportsTemperature|anthropic-messages
workers-ai/@cf/deepseek-ai/deepseek-v4-flash-0731|1048576|1048576|r|0.44,1.32,0.014,0|minimal=- low=- medium=- high=high max=max|!supportsDeveloperRole !supportsReasoningEffort !supportsLongCacheRetention requiresReasoningContentOnAssistantMessages thinkingFormat=deepseek|openai-completions
workers-ai/@cf/deepseek-ai/deepseek-v4-pro-0813|1048576|1048576|r|1.32,3.96,0.044,0|minimal=- low=- medium=- high=high max=max|!supportsDeveloperRole !supportsReasoningEffort !supportsLongCacheRetention requiresReasoningContentOnAssistantMessages thinkingFormat=deepseek|openai-completions
workers-ai/@cf/deepseek-ai/deepseek-v4.1-flash-1017|1048576|1048576|ri|0.3,1.2,0.006,0|minimal=- low=- medium=- high=high max=max|!supportsDeveloperRole !supportsReasoningEffort !supportsLongCacheRetention requiresReasoningContentOnAssistantMessages thinkingFormat=deepseek|openai-completions
workers-ai/@cf/google/gemma-4-26b-a4b-it|256000|16384|ri|0.1,0.3,0.05,0||!supportsDeveloperRole !supportsReasoningEffort !supportsLongCacheRetention|openai-completions
workers-ai/@cf/ibm-granite/granite-4.0-h-micro|131000|131000||0.017,0.112,0,0||!supportsDeveloperRole !supportsReasoningEffort !supportsLongCacheRetention|openai-completions
workers-ai/@cf/meta/llama-3.3-70b-instruct-fp8-fast|24000|24000||0.293,2.253,0,0||!supportsDeveloperRole !supportsReasoningEffort !supportsLongCacheRetention|openai-completions
workers-ai/@cf/meta/llama-4-scout-17b-16e-instruct|131000|16384|i|0.27,0.85,0,0||!supportsDeveloperRole !supportsReasoningEffort !supportsLongCacheRetention|openai-completions
workers-ai/@cf/mistralai/mistral-small-3.1-24b-instruct|128000|128000|i|0.351,0.555,0,0||!supportsDeveloperRole !supportsReasoningEffort !supportsLongCacheRetention|openai-completions
workers-ai/@cf/moonshotai/kimi-k2.6|262144|256000|ri|0.95,4,0.16,0||!supportsDeveloperRole !supportsReasoningEffort !supportsLongCacheRetention|openai-completions
workers-ai/@cf/moonshotai/kimi-k2.7-code|262144|262144|ri|0.95,4,0.19,0||!supportsDeveloperRole !supportsReasoningEffort !supportsLongCacheRetention|openai-completions
workers-ai/@cf/nvidia/nemotron-3-120b-a12b|256000|256000|r|0.5,1.5,0,0||!supportsDeveloperRole !supportsReasoningEffort !supportsLongCacheRetention|openai-completions
workers-ai/@cf/openai/gpt-oss-120b|128000|16384|r|0.35,0.75,0,0||!supportsDeveloperRole !supportsReasoningEffort !supportsLongCacheRetention|openai-completions
workers-ai/@cf/openai/gpt-oss-20b|128000|16384|r|0.2,0.3,0,0||!supportsDeveloperRole !supportsReasoningEffort !supportsLongCacheRetention|openai-completions
workers-ai/@cf/qwen/qwen3-30b-a3b-fp8|32768|32768|r|0.0509,0.335,0,0||!supportsDeveloperRole !supportsReasoningEffort !supportsLongCacheRetention|openai-completions
workers-ai/@cf/qwen/qwen3.8-27b|262144|262144|ri|0.45,3.2,0.05,0||!supportsDeveloperRole !supportsReasoningEffort !supportsLongCacheRetention|openai-completions
workers-ai/@cf/zai-org/glm-4.7-flash|131072|131072|r|0.0605,0.4,0,0||!supportsDeveloperRole !supportsReasoningEffort !supportsLongCacheRetention|openai-completions
workers-ai/@cf/zai-org/glm-5.2|262144|256000|r|1.4,4.4,0.26,0||!supportsDeveloperRole !supportsReasoningEffort !supportsLongCacheRetention|openai-completions
workers-ai/@cf/zai-org/glm-5.3|1048576|1048576|r|1.4,4.4,0.26,0||!supportsDeveloperRole !supportsReasoningEffort !supportsLongCacheRetention|openai-completions
workers-ai/@cf/zai-org/glm-5.3-flash|1048576|1048576|ri|0.15,0.5,0.03,0||!supportsDeveloperRole !supportsReasoningEffort !supportsLongCacheRetention|openai-completions
gpt-4.1|1047576|32768|i|2,8,0.5,0||supportsStrictMode
gpt-4.1-mini|1047576|32768|i|0.4,1.6,0.1,0||supportsStrictMode
gpt-4.1-nano|1000000|32768|i|0.1,0.4,0.025,0||supportsStrictMode
gpt-4o|128000|16384|i|1.25,5,0.625,0||supportsStrictMode
gpt-4o-mini|128000|16384|i|0.075,0.3,0.0375,0||supportsStrictMode
gpt-5|128000|128000|ri|1.25,10,0.125,0|off=- minimal=minimal low=low medium=medium high=high xhigh=- max=-|supportsStrictMode supportsOpenAIGrammarTools
gpt-5-mini|128000|128000|ri|0.25,2,0.025,0|off=- minimal=minimal low=low medium=medium high=high xhigh=- max=-|supportsStrictMode supportsOpenAIGrammarTools
gpt-5-nano|128000|128000|ri|0.05,0.4,0.005,0|off=- minimal=minimal low=low medium=medium high=high xhigh=- max=-|supportsStrictMode supportsOpenAIGrammarTools
gpt-5.1|128000|128000|ri|1.25,10,0.125,0|off=- minimal=- low=low medium=medium high=high xhigh=- max=-|supportsStrictMode supportsOpenAIGrammarTools
gpt-5.4|1000000|128000|ri|2.5,15,0.25,0|off=- minimal=- low=low medium=medium high=high xhigh=xhigh max=-|supportsStrictMode supportsOpenAIGrammarTools
gpt-5.4-mini|128000|128000|ri|0.75,4.5,0.075,0|off=- minimal=- low=low medium=medium high=high xhigh=xhigh max=-|supportsStrictMode supportsOpenAIGrammarTools
gpt-5.4-nano|128000|128000|ri|0.2,1.25,0.02,0|off=- minimal=- low=low medium=medium high=high xhigh=xhigh max=-|supportsStrictMode supportsOpenAIGrammarTools
gpt-5.4-pro|1000000|128000|ri|30,180,0,0|off=- minimal=- low=- medium=medium high=high xhigh=xhigh max=-|supportsStrictMode supportsOpenAIGrammarTools
gpt-5.5|1000000|128000|ri|5,30,0,0|off=- minimal=- low=low medium=medium high=high xhigh=xhigh max=-|supportsStrictMode supportsOpenAIGrammarTools
gpt-5.5-pro|1000000|128000|ri|30,180,0,0|off=- minimal=- low=- medium=medium high=high xhigh=xhigh max=-|supportsStrictMode supportsOpenAIGrammarTools
gpt-5.6-luna|1050000|128000|ri|0.2,1.2,0.02,0.25|off=- minimal=- low=low medium=medium high=high xhigh=xhigh max=max|supportsStrictMode supportsOpenAIGrammarTools
gpt-5.6-sol|1050000|128000|ri|4,20,0.4,5|off=- minimal=- low=low medium=medium high=high xhigh=xhigh max=max|supportsStrictMode supportsOpenAIGrammarTools
gpt-5.6-terra|1050000|128000|ri|2,12,0.2,2.5|off=- minimal=- low=low medium=medium high=high xhigh=xhigh max=max|supportsStrictMode supportsOpenAIGrammarTools
gpt-6-astra|1050000|128000|ri|10,50,1,12.5|off=- minimal=- low=low medium=medium high=high xhigh=xhigh max=max|supportsStrictMode supportsOpenAIGrammarTools
gpt-6-luna|1050000|128000|ri|0.1,0.5,0.01,0.125|off=none minimal=- low=low medium=medium high=high xhigh=xhigh max=max|supportsStrictMode supportsOpenAIGrammarTools
gpt-6-sol|1050000|128000|ri|2,10,0.2,2.5|off=none minimal=- low=low medium=medium high=high xhigh=xhigh max=max|supportsStrictMode supportsOpenAIGrammarTools
gpt-6.1-sol|1050000|128000|ri|2,10,0.1,2.5|off=- minimal=- low=low medium=medium high=high xhigh=xhigh max=max|supportsStrictMode supportsOpenAIGrammarTools
gpt-6.1-terra|1050000|128000|ri|1,5,0.05,1.25|off=none minimal=- low=low medium=medium high=high xhigh=xhigh max=max|supportsStrictMode supportsOpenAIGrammarTools
o3|200000|100000|ri|2,8,0.5,0|off=- minimal=- low=low medium=medium high=high xhigh=- max=-|supportsStrictMode
o3-mini|200000|100000|r|1.1,4.4,0.55,0|off=- minimal=- low=low medium=medium high=high xhigh=- max=-|supportsStrictMode
o4-mini|200000|100000|ri|1.1,4.4,0.275,0|off=- minimal=- low=low medium=medium high=high xhigh=- max=-|supportsStrictMode
""",
"azure": """
chat-latest|400000|128000|ri|5,30,0.5,0
gpt-4|8192|8192||30,60,0,0
gpt-4-turbo|128000|4096|i|10,30,0,0
gpt-4.1|1047576|32768|i|2,8,0.5,0
gpt-4.1-mini|1047576|32768|i|0.4,1.6,0.1,0
gpt-4.1-nano|1047576|32768|i|0.1,0.4,0.025,0
gpt-4o|128000|16384|i|2.5,10,1.25,0
gpt-4o-2024-05-13|128000|4096|i|5,15,0,0
gpt-4o-2024-08-06|128000|16384|i|2.5,10,1.25,0
gpt-4o-2024-11-20|128000|16384|i|2.5,10,1.25,0
gpt-4o-mini|128000|16384|i|0.15,0.6,0.075,0
gpt-5|400000|128000|ri|1.25,10,0.125,0|off=-|supportsOpenAIGrammarTools
gpt-5-chat-latest|128000|16384|i|1.25,10,0.125,0|off=-|supportsOpenAIGrammarTools
gpt-5-mini|400000|128000|ri|0.25,2,0.025,0|off=-|supportsOpenAIGrammarTools
gpt-5-nano|400000|128000|ri|0.05,0.4,0.005,0|off=-|supportsOpenAIGrammarTools
gpt-5-pro|400000|128000|ri|15,120,0,0|off=-|supportsOpenAIGrammarTools
gpt-5.1|400000|128000|ri|1.25,10,0.125,0|off=-|supportsOpenAIGrammarTools
gpt-5.2|400000|128000|ri|1.75,14,0.175,0|off=- xhigh=xhigh|supportsOpenAIGrammarTools
gpt-5.2-pro|400000|128000|ri|21,168,0,0|off=- xhigh=xhigh|supportsOpenAIGrammarTools
gpt-5.3-codex|400000|128000|ri|1.75,14,0.175,0|off=- xhigh=xhigh|supportsOpenAIGrammarTools
gpt-5.3-codex-spark|128000|32000|ri|1.75,14,0.175,0|off=- xhigh=xhigh|supportsOpenAIGrammarTools
gpt-5.4|1050000|128000|ri|2.5,15,0.25,0|off=- xhigh=xhigh|supportsOpenAIGrammarTools
gpt-5.4-mini|400000|128000|ri|0.75,4.5,0.075,0|off=- xhigh=xhigh|supportsOpenAIGrammarTools
gpt-5.4-nano|400000|128000|ri|0.2,1.25,0.02,0|off=- xhigh=xhigh|supportsOpenAIGrammarTools
gpt-5.4-pro|1050000|128000|ri|30,180,0,0|off=- xhigh=xhigh|supportsOpenAIGrammarTools
gpt-5.5|1050000|128000|ri|5,30,0.5,0|off=- xhigh=xhigh|supportsOpenAIGrammarTools
gpt-5.5-pro|1050000|128000|ri|30,180,0,0|off=- minimal=- low=- xhigh=xhigh|supportsOpenAIGrammarTools
gpt-5.6-cyber|400000|128000|ri|12.5,75,1.25,15.625|off=- xhigh=xhigh max=max|supportsOpenAIGrammarTools
gpt-5.6-luna|1050000|128000|ri|0.2,1.2,0.02,0.25|off=- xhigh=xhigh max=max|supportsOpenAIGrammarTools
gpt-5.6-sol|1050000|128000|ri|4,20,0.4,5|off=- xhigh=xhigh max=max|supportsOpenAIGrammarTools
gpt-5.6-terra|1050000|128000|ri|2,12,0.2,2.5|off=- xhigh=xhigh max=max|supportsOpenAIGrammarTools
gpt-6-astra|1050000|128000|ri|10,50,1,12.5|off=- minimal=- low=low medium=medium high=high xhigh=xhigh max=max|supportsOpenAIGrammarTools
gpt-6-luna|1050000|128000|ri|0.1,0.5,0.01,0.125|off=none minimal=- low=low medium=medium high=high xhigh=xhigh max=max|supportsOpenAIGrammarTools
gpt-6-sol|1050000|128000|ri|2,10,0.2,2.5|off=none minimal=- low=low medium=medium high=high xhigh=xhigh max=max|supportsOpenAIGrammarTools
gpt-6.1-sol|1050000|128000|ri|2,10,0.1,2.5|off=- minimal=- low=low medium=medium high=high xhigh=xhigh max=max|supportsOpenAIGrammarTools
gpt-6.1-terra|1050000|128000|ri|1,5,0.05,1.25|off=none minimal=- low=low medium=medium high=high xhigh=xhigh max=max|supportsOpenAIGrammarTools
gpt-daybreak-blue-latest|1050000|128000|ri|4,20,0.4,5
gpt-daybreak-red-latest|400000|128000|ri|12.5,75,1.25,15.625
o1|200000|100000|ri|15,60,7.5,0
o1-pro|200000|100000|ri|150,600,0,0
o3|200000|100000|ri|2,8,0.5,0
o3-mini|200000|100000|r|1.1,4.4,0.55,0
o3-pro|200000|100000|ri|20,80,0,0
o4-mini|200000|100000|ri|1.1,4.4,0.275,0
deepseek-v4-pro|1000000|384000|r|1.925,3.828,0.165,0|minimal=- low=low medium=medium high=high xhigh=- max=-|supportsStrictMode !supportsDeveloperRole supportsMidConvoSystemMessages !supportsLongCacheRetention|openai-completions
""",
"google-vertex": """
gemini-2.5-flash|1048576|65536|ri|0.3,2.5,0.03,0
gemini-2.5-flash-lite|1048576|65536|ri|0.1,0.4,0.01,0
gemini-2.5-pro|1048576|65536|ri|1.25,10,0.125,0
gemini-3-flash-preview|1048576|65536|ri|0.5,3,0.05,0|off=- minimal=minimal low=low medium=medium high=high xhigh=- max=-
gemini-3.1-flash-lite|1048576|65536|ri|0.25,1.5,0.025,0|off=- minimal=minimal low=low medium=medium high=high xhigh=- max=-
gemini-3.1-pro-preview|1048576|65536|ri|2,12,0.2,0|off=- minimal=- low=low medium=medium high=high xhigh=- max=-
gemini-3.1-pro-preview-customtools|1048576|65536|ri|2,12,0.2,0|off=- minimal=- low=low medium=medium high=high xhigh=- max=-
gemini-3.5-flash|1048576|65536|ri|1.5,9,0.15,0|off=- minimal=minimal low=low medium=medium high=high xhigh=- max=-
gemini-3.5-flash-lite|1048576|65536|ri|0.3,2.5,0.03,0|off=- minimal=minimal low=low medium=medium high=high xhigh=- max=-
gemini-3.6-flash|1048576|65536|ri|0.75,3.75,0.075,0|off=- minimal=minimal low=low medium=medium high=high xhigh=- max=-
gemini-3.7-flash|1048576|65536|ri|0.75,3.75,0.075,0|off=- minimal=- low=low medium=medium high=high xhigh=- max=-
gemini-3.8-flash|1048576|65536|ri|0.75,3.75,0.075,0|off=- minimal=- low=low medium=medium high=high xhigh=- max=-
gemini-4-argon|1048576|65536|ri|2,10,0.1,0|off=- minimal=- low=low medium=medium high=high xhigh=- max=-
""",
"github-copilot": """
claude-fable-5|1000000|128000|ri|10,50,1,12.5|off=- xhigh=xhigh max=max|forceAdaptiveThinking supportsMidConvoSystemMessages|anthropic-messages
claude-fable-5.1|1000000|128000|ri|10,50,0.25,12.5|off=- xhigh=xhigh max=max|forceAdaptiveThinking supportsMidConvoSystemMessages|anthropic-messages
claude-haiku-4.5|200000|64000|ri|1,5,0.1,1.25||!supportsEagerToolInputStreaming|anthropic-messages
claude-haiku-5.5|1000000|128000|ri|0.1,0.5,0.01,0.125|xhigh=xhigh max=max|forceAdaptiveThinking !supportsTemperature supportsMidConvoSystemMessages|anthropic-messages
claude-opus-4.8|1000000|64000|ri|5,25,0.5,6.25|minimal=low xhigh=xhigh max=max|forceAdaptiveThinking !supportsTemperature supportsMidConvoSystemMessages|anthropic-messages
claude-opus-5|1000000|64000|ri|5,25,0.5,6.25|minimal=low xhigh=xhigh max=max|forceAdaptiveThinking !supportsTemperature supportsMidConvoSystemMessages|anthropic-messages
claude-opus-5.5|1000000|128000|ri|4,20,0.2,5|off=- minimal=- low=low medium=medium high=high xhigh=xhigh max=max|forceAdaptiveThinking !supportsTemperature supportsMidConvoSystemMessages|anthropic-messages
claude-sonnet-4.6|1000000|32000|ri|3,15,0.3,3.75|minimal=low max=max|forceAdaptiveThinking|anthropic-messages
claude-sonnet-5|1000000|128000|ri|2,10,0.2,2.5|xhigh=xhigh max=max|forceAdaptiveThinking !supportsTemperature|anthropic-messages
claude-sonnet-5.5|1000000|128000|ri|2,10,0.1,2.5|xhigh=xhigh max=max|forceAdaptiveThinking !supportsTemperature supportsMidConvoSystemMessages|anthropic-messages
gemini-3.8-flash|1000000|64000|ri|0.75,3.75,0.075,0||supportsStrictMode !supportsDeveloperRole !supportsReasoningEffort|openai-completions
gemini-4-argon|1048576|65536|ri|2,10,0.1,0||supportsStrictMode !supportsDeveloperRole !supportsReasoningEffort|openai-completions
kimi-k3|1048576|131072|ri|3,15,0.3,0||supportsStrictMode !supportsDeveloperRole !supportsReasoningEffort supportsMidConvoSystemMessages|openai-completions
gpt-5.3-codex|1000000|128000|ri|1.75,14,0.175,0|off=- minimal=low low=low medium=medium high=high xhigh=xhigh max=-|supportsOpenAIGrammarTools
gpt-5.4-nano|400000|128000|ri|0.2,1.25,0.02,0|off=- minimal=low low=low medium=medium high=high xhigh=xhigh max=-|supportsOpenAIGrammarTools
gpt-5.6-luna|1050000|128000|ri|0.2,1.2,0.02,0.25|off=- minimal=low low=low medium=medium high=high xhigh=xhigh max=max|supportsMidConvoSystemMessages supportsAdditionalTools supportsOpenAIGrammarTools
gpt-5.6-sol|1050000|128000|ri|4,20,0.4,5|off=- minimal=low low=low medium=medium high=high xhigh=xhigh max=max|supportsMidConvoSystemMessages supportsAdditionalTools supportsOpenAIGrammarTools
gpt-5.6-terra|1050000|128000|ri|2,12,0.2,2.5|off=- minimal=low low=low medium=medium high=high xhigh=xhigh max=max|supportsMidConvoSystemMessages supportsAdditionalTools supportsOpenAIGrammarTools
gpt-6-astra|1000000|128000|ri|10,50,1,12.5|off=- minimal=- low=low medium=medium high=high xhigh=xhigh max=max|supportsMidConvoSystemMessages supportsAdditionalTools supportsOpenAIGrammarTools
gpt-6-luna|1000000|128000|ri|0.1,0.5,0.01,0.125|off=none minimal=- low=low medium=medium high=high xhigh=xhigh max=max|supportsMidConvoSystemMessages supportsAdditionalTools supportsOpenAIGrammarTools
gpt-6-sol|1000000|128000|ri|2,10,0.2,2.5|off=none minimal=- low=low medium=medium high=high xhigh=xhigh max=max|supportsMidConvoSystemMessages supportsAdditionalTools supportsOpenAIGrammarTools
gpt-6.1-sol|1050000|128000|ri|2,10,0.1,2.5|off=- minimal=- low=low medium=medium high=high xhigh=xhigh max=max|supportsMidConvoSystemMessages supportsAdditionalTools supportsOpenAIGrammarTools
gpt-6.1-terra|1050000|128000|ri|1,5,0.05,1.25|off=none minimal=- low=low medium=medium high=high xhigh=xhigh max=max|supportsMidConvoSystemMessages supportsAdditionalTools supportsOpenAIGrammarTools
grok-4.5|500000|128000|ri|2,6,0.5,0|off=- minimal=- low=low medium=medium high=high xhigh=- max=-
grok-4.6|500000|128000|ri|2,6,0.5,0|off=- minimal=- low=low medium=medium high=high xhigh=xhigh max=-
grok-4.7|500000|128000|ri|2,6,0.5,0|off=- minimal=- low=low medium=medium high=high xhigh=xhigh max=-
mai-code-1.1-flash|256000|128000|ri|0.2,1.2,0.02,0|off=- minimal=- low=low medium=medium high=high xhigh=- max=-
""",
"opencode": """
claude-fable-5|1000000|128000|ri|10,50,1,12.5|off=- xhigh=xhigh max=max|forceAdaptiveThinking supportsMidConvoSystemMessages|anthropic-messages
claude-fable-5-1|1000000|128000|ri|10,50,0.25,12.5|off=- xhigh=xhigh max=max|forceAdaptiveThinking supportsMidConvoSystemMessages supportsMidConvoEffort|anthropic-messages
claude-fable-5-2|1000000|128000|ri|8,40,0.2,10|off=- xhigh=xhigh max=max|forceAdaptiveThinking supportsMidConvoSystemMessages supportsMidConvoEffort|anthropic-messages
claude-haiku-4-5|200000|64000|ri|1,5,0.1,1.25|||anthropic-messages
claude-haiku-5-5|1000000|128000|ri|0.1,0.5,0.01,0.125|xhigh=xhigh max=max|forceAdaptiveThinking !supportsTemperature supportsMidConvoSystemMessages supportsMidConvoEffort|anthropic-messages
claude-opus-4-5|200000|64000|ri|5,25,0.5,6.25|||anthropic-messages
claude-opus-4-6|1000000|128000|ri|5,25,0.5,6.25|max=max|forceAdaptiveThinking|anthropic-messages
claude-opus-4-7|1000000|128000|ri|5,25,0.5,6.25|xhigh=xhigh max=max|forceAdaptiveThinking !supportsTemperature|anthropic-messages
claude-opus-4-8|1000000|128000|ri|5,25,0.5,6.25|xhigh=xhigh max=max|forceAdaptiveThinking !supportsTemperature supportsMidConvoSystemMessages|anthropic-messages
claude-opus-5|1000000|128000|ri|5,25,0.5,6.25|xhigh=xhigh max=max|forceAdaptiveThinking !supportsTemperature supportsMidConvoSystemMessages supportsMidConvoEffort|anthropic-messages
claude-opus-5-5|1000000|128000|ri|4,20,0.2,5|off=- xhigh=xhigh max=max|forceAdaptiveThinking !supportsTemperature supportsMidConvoSystemMessages supportsMidConvoEffort|anthropic-messages
claude-sonnet-4-5|200000|64000|ri|3,15,0.3,3.75|||anthropic-messages
claude-sonnet-4-6|1000000|64000|ri|3,15,0.3,3.75|max=max|forceAdaptiveThinking|anthropic-messages
claude-sonnet-5|1000000|128000|ri|2,10,0.2,2.5|xhigh=xhigh max=max|forceAdaptiveThinking !supportsTemperature|anthropic-messages
claude-sonnet-5-5|1000000|128000|ri|2,10,0.1,2.5|off=- xhigh=xhigh max=max|forceAdaptiveThinking !supportsTemperature supportsMidConvoSystemMessages supportsMidConvoEffort|anthropic-messages
qwen3.5-plus|262144|65536|ri|0.2,1.2,0.02,0.25|||anthropic-messages
qwen3.6-plus|262144|65536|ri|0.5,3,0.05,0.625|||anthropic-messages
qwen3.8-flash|1000000|131072|ri|0.15,0.47,0.016,0.2||allowEmptySignature|anthropic-messages
gemini-3-flash|1048576|65536|ri|0.5,3,0.05,0|off=- minimal=minimal low=low medium=medium high=high xhigh=- max=-||google-generative-ai
gemini-3.1-pro|1048576|65536|ri|2,12,0.2,0|off=- minimal=- low=low medium=medium high=high xhigh=- max=-||google-generative-ai
gemini-3.5-flash|1048576|65536|ri|1.5,9,0.15,0|off=- minimal=minimal low=low medium=medium high=high xhigh=- max=-||google-generative-ai
gemini-3.5-flash-lite|1048576|65536|ri|0.3,2.5,0.03,0|off=- minimal=minimal low=low medium=medium high=high xhigh=- max=-||google-generative-ai
gemini-3.6-flash|1048576|65536|ri|0.75,3.75,0.075,0|off=- minimal=minimal low=low medium=medium high=high xhigh=- max=-||google-generative-ai
gemini-3.7-flash|1048576|65536|ri|0.75,3.75,0.075,0|off=- minimal=- low=low medium=medium high=high xhigh=- max=-||google-generative-ai
gemini-3.8-flash|1048576|65536|ri|0.75,3.75,0.075,0|off=- minimal=- low=low medium=medium high=high xhigh=- max=-||google-generative-ai
gemini-4-argon|1048576|65536|ri|2,10,0.1,0|off=- minimal=- low=low medium=medium high=high xhigh=- max=-||google-generative-ai
beam-free|1048576|131072|r||off=- minimal=- low=low medium=medium high=high xhigh=xhigh max=max|!supportsDeveloperRole supportsStrictMode|openai-completions
big-pickle|200000|32000|r|||!supportsDeveloperRole supportsStrictMode|openai-completions
deepseek-v4-pro|1000000|384000|r|1.74,3.48,0.145,0|off=- minimal=- low=- medium=- high=high xhigh=- max=max|!supportsDeveloperRole supportsStrictMode !supportsLongCacheRetention requiresReasoningContentOnAssistantMessages|openai-completions
deepseek-v4.1-flash|1000000|384000|ri|0.3,1.2,0.006,0|off=- minimal=- low=low medium=- high=high xhigh=- max=max|!supportsDeveloperRole supportsStrictMode !supportsLongCacheRetention requiresReasoningContentOnAssistantMessages|openai-completions
deepseek-v4.1-flash-free|200000|32000|ri||off=- minimal=- low=low medium=- high=high xhigh=- max=max|!supportsDeveloperRole supportsStrictMode requiresReasoningContentOnAssistantMessages|openai-completions
flint-40b-free|262144|65536|r||off=- minimal=- low=low medium=medium high=high xhigh=xhigh max=max|!supportsDeveloperRole supportsStrictMode|openai-completions
glm-5|204800|131072|r|1,3.2,0.2,0||!supportsDeveloperRole supportsStrictMode|openai-completions
glm-5.1|204800|131072|r|1.4,4.4,0.26,0||!supportsDeveloperRole supportsStrictMode|openai-completions
glm-5.2|1000000|131072|r|1.4,4.4,0.26,0|off=- minimal=- low=- medium=- high=high xhigh=- max=max|!supportsDeveloperRole supportsStrictMode|openai-completions
glm-5.3|1000000|131072|r|1.4,4.4,0.26,0|off=- minimal=- low=low medium=- high=high xhigh=- max=max|!supportsDeveloperRole supportsStrictMode|openai-completions
glm-5.3-flash|1000000|131072|ri|0.15,0.5,0.03,0|off=- minimal=- low=low medium=- high=high xhigh=- max=max|!supportsDeveloperRole supportsStrictMode|openai-completions
glm-5.3-flash-free|200000|32000|ri||off=- minimal=- low=low medium=- high=high xhigh=- max=max|!supportsDeveloperRole supportsStrictMode|openai-completions
iceman-free|262144|131072|r|||!supportsDeveloperRole supportsStrictMode|openai-completions
inkling-2-small-free|1048576|131072|ri||off=none minimal=minimal low=low medium=medium high=high xhigh=- max=max|!supportsDeveloperRole supportsStrictMode|openai-completions
kimi-k2.5|262144|65536|ri|0.6,3,0.1,0||!supportsDeveloperRole supportsStrictMode !supportsLongCacheRetention|openai-completions
kimi-k2.6|262144|65536|ri|0.95,4,0.16,0||!supportsDeveloperRole supportsStrictMode thinkingFormat=deepseek !supportsReasoningEffort !supportsLongCacheRetention|openai-completions
kimi-k2.7-code|262144|262144|ri|0.95,4,0.19,0||!supportsDeveloperRole supportsStrictMode|openai-completions
kimi-k3|1048576|131072|ri|3,15,0.3,3|off=- minimal=- low=low medium=- high=high xhigh=- max=max|!supportsDeveloperRole supportsStrictMode supportsMidConvoSystemMessages supportsMidConvoToolAdditions|openai-completions
longcat-2.5-free|1000000|262144|ri|||!supportsDeveloperRole supportsStrictMode|openai-completions
mimo-v2.6-flash-free|200000|32000|ri|||!supportsDeveloperRole supportsStrictMode|openai-completions
minimax-m2.5|204800|131072|r|0.3,1.2,0.06,0||!supportsDeveloperRole supportsStrictMode|openai-completions
minimax-m2.7|204800|131072|r|0.3,1.2,0.06,0||!supportsDeveloperRole supportsStrictMode !supportsLongCacheRetention|openai-completions
minimax-m3|512000|128000|ri|0.3,1.2,0.06,0||!supportsDeveloperRole supportsStrictMode|openai-completions
minimax-m3.1-flash-free|1000000|512000|ri||off=- minimal=- low=low medium=medium high=high xhigh=xhigh max=max|!supportsDeveloperRole supportsStrictMode|openai-completions
mistral-large-4|524288|262144|ri|0.68,2.09,0.07,0|off=none minimal=- low=- medium=- high=high xhigh=- max=-|!supportsDeveloperRole supportsStrictMode|openai-completions
nemotron-3.5-lightning-free|262144|262144|r|||!supportsDeveloperRole supportsStrictMode|openai-completions
nemotron-3.5-super-vl-free|1048576|131072|ri||off=none minimal=minimal low=low medium=medium high=high xhigh=xhigh max=-|!supportsDeveloperRole supportsStrictMode|openai-completions
qwen3.8-max|262144|131072|ri|2,6,0.25,2.5|off=- minimal=- low=low medium=medium high=- xhigh=xhigh max=-|!supportsDeveloperRole supportsStrictMode|openai-completions
gpt-5|400000|128000|ri|1.07,8.5,0.107,0|off=- minimal=minimal low=low medium=medium high=high xhigh=- max=-|sessionAffinityFormat=openai-nosession supportsOpenAIGrammarTools
gpt-5-codex|400000|128000|ri|1.07,8.5,0.107,0|off=- minimal=- low=low medium=medium high=high xhigh=- max=-|sessionAffinityFormat=openai-nosession supportsOpenAIGrammarTools
gpt-5-nano|400000|128000|ri|0.05,0.4,0.005,0|off=- minimal=minimal low=low medium=medium high=high xhigh=- max=-|sessionAffinityFormat=openai-nosession supportsOpenAIGrammarTools
gpt-5.1|400000|128000|ri|1.07,8.5,0.107,0|off=- minimal=- low=low medium=medium high=high xhigh=- max=-|sessionAffinityFormat=openai-nosession supportsOpenAIGrammarTools
gpt-5.1-codex|400000|128000|ri|1.07,8.5,0.107,0|off=- minimal=- low=low medium=medium high=high xhigh=- max=-|sessionAffinityFormat=openai-nosession supportsOpenAIGrammarTools
gpt-5.1-codex-max|400000|128000|ri|1.25,10,0.125,0|off=- minimal=- low=low medium=medium high=high xhigh=xhigh max=-|sessionAffinityFormat=openai-nosession supportsOpenAIGrammarTools
gpt-5.1-codex-mini|400000|128000|ri|0.25,2,0.025,0|off=- minimal=- low=low medium=medium high=high xhigh=- max=-|sessionAffinityFormat=openai-nosession supportsOpenAIGrammarTools
gpt-5.2|400000|128000|ri|1.75,14,0.175,0|off=- minimal=- low=low medium=medium high=high xhigh=xhigh max=-|sessionAffinityFormat=openai-nosession supportsOpenAIGrammarTools
gpt-5.2-codex|400000|128000|ri|1.75,14,0.175,0|off=- minimal=- low=low medium=medium high=high xhigh=xhigh max=-|sessionAffinityFormat=openai-nosession supportsOpenAIGrammarTools
gpt-5.3-codex|400000|128000|ri|1.75,14,0.175,0|off=- minimal=- low=low medium=medium high=high xhigh=xhigh max=-|sessionAffinityFormat=openai-nosession supportsOpenAIGrammarTools
gpt-5.4|272000|128000|ri|2.5,15,0.25,0|off=- minimal=- low=low medium=medium high=high xhigh=xhigh max=-|sessionAffinityFormat=openai-nosession supportsMidConvoSystemMessages supportsOpenAIGrammarTools
gpt-5.4-mini|400000|128000|ri|0.75,4.5,0.075,0|off=- minimal=- low=low medium=medium high=high xhigh=xhigh max=-|sessionAffinityFormat=openai-nosession supportsMidConvoSystemMessages supportsOpenAIGrammarTools
gpt-5.4-nano|400000|128000|ri|0.2,1.25,0.02,0|off=- minimal=- low=low medium=medium high=high xhigh=xhigh max=-|sessionAffinityFormat=openai-nosession supportsOpenAIGrammarTools
gpt-5.4-pro|1050000|128000|ri|30,180,30,0|off=- minimal=- low=- medium=medium high=high xhigh=xhigh max=-|sessionAffinityFormat=openai-nosession supportsMidConvoSystemMessages supportsOpenAIGrammarTools
gpt-5.5|1050000|128000|ri|5,30,0.5,0|off=- minimal=- low=low medium=medium high=high xhigh=xhigh max=-|sessionAffinityFormat=openai-nosession supportsMidConvoSystemMessages supportsOpenAIGrammarTools
gpt-5.5-pro|1050000|128000|ri|30,180,30,0|off=- minimal=- low=- medium=medium high=high xhigh=xhigh max=-|sessionAffinityFormat=openai-nosession supportsOpenAIGrammarTools
gpt-5.6-luna|1050000|128000|ri|0.2,1.2,0.02,0.25|off=- minimal=- low=low medium=medium high=high xhigh=xhigh max=max|sessionAffinityFormat=openai-nosession supportsMidConvoSystemMessages supportsAdditionalTools supportsOpenAIGrammarTools
gpt-5.6-sol|1050000|128000|ri|4,20,0.4,5|off=- minimal=- low=low medium=medium high=high xhigh=xhigh max=max|sessionAffinityFormat=openai-nosession supportsMidConvoSystemMessages supportsAdditionalTools supportsOpenAIGrammarTools
gpt-5.6-terra|1050000|128000|ri|2,12,0.2,2.5|off=- minimal=- low=low medium=medium high=high xhigh=xhigh max=max|sessionAffinityFormat=openai-nosession supportsMidConvoSystemMessages supportsAdditionalTools supportsOpenAIGrammarTools
gpt-6-astra|1050000|128000|ri|10,50,1,12.5|off=- minimal=- low=low medium=medium high=high xhigh=xhigh max=max|sessionAffinityFormat=openai-nosession supportsMidConvoSystemMessages supportsAdditionalTools supportsOpenAIGrammarTools
gpt-6-luna|1050000|128000|ri|0.1,0.5,0.01,0.125|off=none minimal=- low=low medium=medium high=high xhigh=xhigh max=max|sessionAffinityFormat=openai-nosession supportsMidConvoSystemMessages supportsAdditionalTools supportsOpenAIGrammarTools
gpt-6-sol|1050000|128000|ri|2,10,0.2,2.5|off=none minimal=- low=low medium=medium high=high xhigh=xhigh max=max|sessionAffinityFormat=openai-nosession supportsMidConvoSystemMessages supportsAdditionalTools supportsOpenAIGrammarTools
gpt-6.1-sol|1050000|128000|ri|2,10,0.1,2.5|off=- minimal=- low=low medium=medium high=high xhigh=xhigh max=max|sessionAffinityFormat=openai-nosession supportsMidConvoSystemMessages supportsAdditionalTools supportsOpenAIGrammarTools
grok-4.5|500000|500000|ri|2,6,0.3,0|off=- minimal=- low=low medium=medium high=high xhigh=- max=-|sessionAffinityFormat=openai-nosession
grok-4.6|500000|500000|ri|2,6,0.5,0|off=- minimal=- low=low medium=medium high=high xhigh=xhigh max=-|sessionAffinityFormat=openai-nosession
grok-4.7|500000|500000|ri|2,6,0.5,0|off=- minimal=- low=low medium=medium high=high xhigh=xhigh max=-|sessionAffinityFormat=openai-nosession
grok-build-0.1|256000|256000|ri|1,2,0.2,0|off=- minimal=- low=- medium=-|sessionAffinityFormat=openai-nosession !supportsReasoningEffort
muse-ember-1.0|1048576|270000|ri|0.1,0.5,0.004,0|off=- minimal=minimal low=low medium=medium high=high xhigh=xhigh max=max|sessionAffinityFormat=openai-nosession
muse-spark-1.2|1048576|131072|ri|1.25,4.25,0.15,0|off=- minimal=minimal low=low medium=medium high=high xhigh=xhigh max=-|sessionAffinityFormat=openai-nosession
muse-spark-1.3|1048576|131072|ri|1.25,4.25,0.15,0|off=- minimal=minimal low=low medium=medium high=high xhigh=xhigh max=-|sessionAffinityFormat=openai-nosession
muse-wonder-1.0|1048576|131072|ri|4,20,0.2,0|off=- minimal=minimal low=low medium=medium high=high xhigh=xhigh max=max|sessionAffinityFormat=openai-nosession
""",
"opencode-go": """
claude-haiku-5-5|1000000|128000|ri|0.1,0.5,0.01,0.125|xhigh=xhigh max=max|forceAdaptiveThinking !supportsTemperature supportsMidConvoEffort|anthropic-messages
minimax-m3|1000000|131072|ri|0.3,1.2,0.06,0|||anthropic-messages
qwen3.7-plus|1000000|65536|ri|0.4,1.6,0.04,0.5|||anthropic-messages
qwen3.8-flash|1000000|131072|ri|0.15,0.47,0.016,0.2||allowEmptySignature|anthropic-messages
qwen3.8-max|1000000|131072|ri|2,6,0.25,2.5|||anthropic-messages
gemini-4-argon|1048576|65536|ri|2,10,0.1,0|off=- minimal=- low=low medium=medium high=high xhigh=- max=-||google-generative-ai
beam-free|1048576|131072|r||off=- minimal=- low=low medium=medium high=high xhigh=xhigh max=max|!supportsDeveloperRole supportsStrictMode
deepseek-v4-pro|1000000|384000|r|0.66,1.98,0.022,0|minimal=- low=- medium=- high=high max=max|!supportsDeveloperRole supportsStrictMode requiresReasoningContentOnAssistantMessages thinkingFormat=deepseek
deepseek-v4.1-flash|1000000|384000|ri|0.15,0.6,0.003,0|off=- minimal=- low=low medium=- high=high xhigh=- max=max|!supportsDeveloperRole supportsStrictMode requiresReasoningContentOnAssistantMessages thinkingFormat=deepseek
glm-5.2|1000000|131072|r|1.4,4.4,0.26,0|off=- minimal=- low=- medium=- high=high xhigh=- max=max|!supportsDeveloperRole supportsStrictMode
glm-5.3|1000000|131072|r|1.4,4.4,0.26,0|off=- minimal=- low=low medium=- high=high xhigh=- max=max|!supportsDeveloperRole supportsStrictMode
glm-5.3-flash|1000000|131072|ri|0.15,0.5,0.03,0|off=- minimal=- low=low medium=- high=high xhigh=- max=max|!supportsDeveloperRole supportsStrictMode
hy3|256000|128000|r|0.14,0.58,0.035,0|off=none minimal=- low=low medium=- high=high xhigh=- max=-|!supportsDeveloperRole supportsStrictMode
hy4|1048576|65536|ri|0.834,2.501,0.042,0|off=none minimal=- low=- medium=- high=high xhigh=- max=-|!supportsDeveloperRole supportsStrictMode
hy4-preview|1024000|64000|r|0.834,2.501,0.042,0|off=none minimal=- low=- medium=- high=high xhigh=- max=-|!supportsDeveloperRole supportsStrictMode
iceman-contributor-free|262144|131072|r|||!supportsDeveloperRole supportsStrictMode
kimi-k2.7-code|262144|262144|ri|0.95,4,0.19,0||!supportsDeveloperRole supportsStrictMode
kimi-k3|1048576|131072|ri|3,15,0.3,3|off=- minimal=- low=- medium=- high=- xhigh=- max=max|!supportsDeveloperRole supportsStrictMode supportsMidConvoSystemMessages supportsMidConvoToolAdditions
kimi-k3.1-pro|1048576|131072|ri|2,10,0.2,2|off=- minimal=- low=low medium=- high=high xhigh=- max=max|!supportsDeveloperRole supportsStrictMode supportsMidConvoSystemMessages supportsMidConvoToolAdditions
longcat-2.0|1000000|131072|r|0.3,1.2,0.006,0||!supportsDeveloperRole supportsStrictMode
longcat-2.5-free|1000000|262144|ri|||!supportsDeveloperRole supportsStrictMode
mimo-v2.5|1000000|128000|ri|0.14,0.28,0.0028,0||!supportsDeveloperRole supportsStrictMode
mimo-v2.5-pro|1048576|128000|r|0.435,0.87,0.003625,0||!supportsDeveloperRole supportsStrictMode
mimo-v2.6-flash|1048576|131072|ri|0.14,0.28,0.0028,0||!supportsDeveloperRole supportsStrictMode
mimo-v2.6-pro|1048576|131072|ri|0.435,0.87,0.003625,0||!supportsDeveloperRole supportsStrictMode
minimax-m3.1-flash|1000000|512000|ri|0.15,0.6,0.015,0|off=- minimal=- low=low medium=medium high=high xhigh=xhigh max=max|!supportsDeveloperRole supportsStrictMode
step-5-preview|1000000|65536|ri|1,2.7,0.1,0|off=- minimal=- low=low medium=medium high=high xhigh=- max=-|!supportsDeveloperRole supportsStrictMode
gpt-5.6-luna|1050000|128000|ri|0.2,1.2,0.02,0.25|off=- minimal=- low=low medium=medium high=high xhigh=xhigh max=max|sessionAffinityFormat=openai-nosession supportsMidConvoSystemMessages supportsAdditionalTools|openai-responses
gpt-6-luna|1050000|128000|ri|0.1,0.5,0.01,0.125|off=none minimal=- low=low medium=medium high=high xhigh=xhigh max=max|sessionAffinityFormat=openai-nosession supportsMidConvoSystemMessages supportsAdditionalTools|openai-responses
grok-4.7|500000|500000|ri|2,6,0.5,0|off=- minimal=- low=low medium=medium high=high xhigh=xhigh max=-|sessionAffinityFormat=openai-nosession|openai-responses
muse-spark-1.2-contributor|1048576|131072|ri|0.1,0.2,0.002,0|off=- minimal=minimal low=low medium=medium high=high xhigh=xhigh max=-|sessionAffinityFormat=openai-nosession|openai-responses
muse-spark-1.3-contributor|1048576|131072|ri|0.1,0.2,0.002,0|off=- minimal=minimal low=low medium=medium high=high xhigh=xhigh max=-|sessionAffinityFormat=openai-nosession|openai-responses
""",
"openrouter": """
anthropic/claude-haiku-4.5|200000|64000|ri|1,5,0.1,1.25|||anthropic-messages
anthropic/claude-haiku-5.5|1000000|128000|ri|0.1,0.5,0.01,0.125|off=none minimal=- low=low medium=medium high=high xhigh=xhigh max=max|forceAdaptiveThinking !supportsTemperature supportsMidConvoEffort|anthropic-messages
anthropic/claude-opus-4.8|1000000|128000|ri|5,25,0.5,6.25|off=none minimal=- low=low medium=medium high=high xhigh=xhigh max=max|forceAdaptiveThinking !supportsTemperature|anthropic-messages
anthropic/claude-opus-5|1000000|128000|ri|5,25,0.5,6.25|off=none minimal=- low=low medium=medium high=high xhigh=xhigh max=max|forceAdaptiveThinking !supportsTemperature|anthropic-messages
anthropic/claude-opus-5.5|1000000|128000|ri|4,20,0.2,5|off=- minimal=- low=low medium=medium high=high xhigh=xhigh max=max|forceAdaptiveThinking !supportsTemperature supportsMidConvoEffort|anthropic-messages
anthropic/claude-sonnet-4.5|1000000|64000|ri|3,15,0.3,3.75|||anthropic-messages
anthropic/claude-sonnet-5|1000000|128000|ri|2,10,0.2,2.5|off=none minimal=- low=low medium=medium high=high xhigh=xhigh max=max|forceAdaptiveThinking !supportsTemperature|anthropic-messages
anthropic/claude-sonnet-5.5|1000000|128000|ri|2,10,0.1,2.5|off=- minimal=- low=low medium=medium high=high xhigh=xhigh max=max|forceAdaptiveThinking !supportsTemperature supportsMidConvoEffort|anthropic-messages
~deepseek/deepseek-v4-flash-latest|1048576|943718|r|0.0434,0.3,0.035,0|off=none minimal=- low=low medium=- high=high xhigh=- max=max|requiresReasoningContentOnAssistantMessages
anthropic/claude-haiku-4.5:batch|200000|64000|ri|0.5,2.5,0.05,0.625||supportsDeveloperRole cacheControlFormat=anthropic
anthropic/claude-haiku-5.5:batch|1000000|128000|ri|0.05,0.25,0.005,0.0625|off=none minimal=- low=low medium=medium high=high xhigh=xhigh max=max|supportsDeveloperRole cacheControlFormat=anthropic
anthropic/claude-opus-4.8:batch|1000000|128000|ri|2.5,12.5,0.25,3.125|off=none minimal=- low=low medium=medium high=high xhigh=xhigh max=max|supportsDeveloperRole cacheControlFormat=anthropic
anthropic/claude-opus-5:batch|1000000|128000|ri|2.5,12.5,0.25,3.125|off=none minimal=- low=low medium=medium high=high xhigh=xhigh max=max|supportsDeveloperRole cacheControlFormat=anthropic
anthropic/claude-opus-5.5:batch|1000000|128000|ri|2,10,0.1,2.5|off=- minimal=- low=low medium=medium high=high xhigh=xhigh max=max|supportsDeveloperRole cacheControlFormat=anthropic
anthropic/claude-sonnet-4.5:batch|1000000|64000|ri|1.5,7.5,0.15,1.875||supportsDeveloperRole cacheControlFormat=anthropic
anthropic/claude-sonnet-5:batch|1000000|128000|ri|1,5,0.1,1.25|off=none minimal=- low=low medium=medium high=high xhigh=xhigh max=max|supportsDeveloperRole cacheControlFormat=anthropic
anthropic/claude-sonnet-5.5:batch|1000000|128000|ri|1,5,0.05,1.25|off=- minimal=- low=low medium=medium high=high xhigh=xhigh max=max|supportsDeveloperRole cacheControlFormat=anthropic
deepseek/deepseek-r1-0528|163840|32768|r|0.5,2.15,0.35,0|off=-
deepseek/deepseek-v4-flash|1048575|943717|r|0.091,0.182,0.0182,0|off=none minimal=- low=- medium=- high=high xhigh=xhigh max=-|requiresReasoningContentOnAssistantMessages
deepseek/deepseek-v4-flash-0731|1048576|943718|r|0.0434,0.3,0.035,0|off=none minimal=- low=low medium=- high=high xhigh=- max=max|requiresReasoningContentOnAssistantMessages
deepseek/deepseek-v4-flash-0731:batch|1048576|384000|r|0.048,0.144,0.012,0|off=none minimal=- low=low medium=- high=high xhigh=- max=max|requiresReasoningContentOnAssistantMessages
deepseek/deepseek-v4-flash-vision-exp|1048575|943717|ri|0.44,1.32,0.014,0|off=none minimal=- low=low medium=- high=high xhigh=- max=max|requiresReasoningContentOnAssistantMessages
deepseek/deepseek-v4-pro|1024000|384000|r|0.95526,1.91052,0.079605,0|off=none minimal=- low=- medium=- high=high xhigh=xhigh max=-|requiresReasoningContentOnAssistantMessages
deepseek/deepseek-v4-pro-0813|1048576|943718|r|0.111,4.44,0.097,0|off=none minimal=- low=low medium=- high=high xhigh=- max=max|requiresReasoningContentOnAssistantMessages
deepseek/deepseek-v4.1-flash|1048576|943718|ri|0.006,0.5,0.005,0|off=none minimal=- low=low medium=- high=high xhigh=- max=max|requiresReasoningContentOnAssistantMessages
deepseek/deepseek-v4.1-flash-1017|1048576|943718|ri|0.006,0.5,0.005,0|off=none minimal=- low=low medium=- high=high xhigh=- max=max|requiresReasoningContentOnAssistantMessages
deepseek/deepseek-v4.1-flash-1017:batch|1048576|943718|ri|0.011,0.2,0.002,0|off=none minimal=- low=low medium=- high=high xhigh=- max=max|requiresReasoningContentOnAssistantMessages
deepseek/deepseek-v4.1-flash:batch|1048576|131072|ri|0.112,0.336,0.00336,0|off=none minimal=- low=low medium=- high=high xhigh=- max=max|requiresReasoningContentOnAssistantMessages
google/gemini-2.5-flash|1048576|65535|ri|0.3,2.5,0.03,0.083333
google/gemini-2.5-flash-lite|1048576|65535|ri|0.1,0.4,0.01,0.083333
google/gemini-2.5-pro|1048576|65536|ri|1.25,10,0.125,0.375|off=-
google/gemini-2.5-pro-preview|1048576|65536|ri|1.25,10,0.125,0.375|off=-
google/gemini-3-flash-preview|1048576|65536|ri|0.5,3,0.05,0.083333|off=none minimal=minimal low=low medium=medium high=high xhigh=- max=-
google/gemini-3-flash-preview:batch|1048576|65536|ri|0.25,1.5,0,0|off=none minimal=minimal low=low medium=medium high=high xhigh=- max=-
google/gemini-3-pro-image|65536|32768|ri|2,12,0.2,0.375|off=-
google/gemini-3.1-flash-lite|1048576|65536|ri|0.25,1.5,0.025,0.083333|off=none minimal=minimal low=low medium=medium high=high xhigh=- max=-
google/gemini-3.1-flash-lite-preview|1048576|65536|ri|0.25,1.5,0.025,0.083333|off=none minimal=minimal low=low medium=medium high=high xhigh=- max=-
google/gemini-3.1-flash-lite:batch|1048576|65536|ri|0.125,0.75,0.0125,0|off=none minimal=minimal low=low medium=medium high=high xhigh=- max=-
google/gemini-3.1-pro-preview|1048576|65536|ri|2,12,0.2,0.375|off=- minimal=- low=low medium=medium high=high xhigh=- max=-
google/gemini-3.1-pro-preview-customtools|1048576|65536|ri|2,12,0.2,0.375|off=- minimal=- low=low medium=medium high=high xhigh=- max=-
""",
"vercel-ai-gateway": """
alibaba/qwen3-coder|262144|32768||0.22,1.8,0.022,0
alibaba/qwen3-coder-30b-a3b|262144|8192||0.15,0.6,0,0
alibaba/qwen3-coder-next|256000|256000||0.5,1.2,0,0
alibaba/qwen3-max-thinking|256000|65536|r|1.2,6,0.24,0
alibaba/qwen3.7-max|991000|64000|r|2.5,7.5,0.5,3.125
alibaba/qwen3.8-max|262144|128000|ri|2,6,0.25,0
alibaba/qwen3.8-max-0902|991000|128000|ri|2,6,0.25,2.5
alibaba/qwen3.8-max-prime|1000000|131072|ri|4,12,0.5,5
anthropic/claude-haiku-4.5|200000|64000|ri|1,5,0.1,1.25
anthropic/claude-haiku-4.5-batch|200000|64000|ri|0.5,2.5,0.05,0.625
anthropic/claude-haiku-5.5|1000000|128000|ri|0.1,0.5,0.01,0.125|xhigh=xhigh max=max|forceAdaptiveThinking !supportsTemperature
anthropic/claude-haiku-5.5-batch|1000000|128000|ri|0.05,0.25,0.005,0.0625|xhigh=xhigh max=max|forceAdaptiveThinking !supportsTemperature
anthropic/claude-opus-4.8|1000000|128000|ri|5,25,0.5,6.25|xhigh=xhigh max=max|forceAdaptiveThinking !supportsTemperature
anthropic/claude-opus-4.8-batch|1000000|128000|ri|2.5,12.5,0.25,3.125|xhigh=xhigh max=max|forceAdaptiveThinking !supportsTemperature
anthropic/claude-opus-4.8-fast|1000000|128000|ri|10,50,1,12.5|xhigh=xhigh max=max|forceAdaptiveThinking !supportsTemperature
anthropic/claude-opus-5|1000000|128000|ri|5,25,0.5,6.25|xhigh=xhigh max=max|forceAdaptiveThinking !supportsTemperature
anthropic/claude-opus-5-batch|1000000|128000|ri|2.5,12.5,0.25,3.125|xhigh=xhigh max=max|forceAdaptiveThinking !supportsTemperature
anthropic/claude-opus-5-fast|1000000|128000|ri|10,50,1,12.5|xhigh=xhigh max=max|forceAdaptiveThinking !supportsTemperature
anthropic/claude-opus-5.5|1000000|128000|ri|4,20,0.2,5|xhigh=xhigh max=max|forceAdaptiveThinking !supportsTemperature
anthropic/claude-opus-5.5-batch|1000000|128000|ri|2,10,0.1,2.5|xhigh=xhigh max=max|forceAdaptiveThinking !supportsTemperature
anthropic/claude-opus-5.5-fast|1000000|128000|ri|8,40,0.4,10|xhigh=xhigh max=max|forceAdaptiveThinking !supportsTemperature
anthropic/claude-sonnet-4.5|1000000|64000|ri|3,15,0.3,3.75
anthropic/claude-sonnet-4.5-batch|1000000|64000|ri|1.5,7.5,0.15,1.875
anthropic/claude-sonnet-5|1000000|128000|ri|2,10,0.2,2.5|xhigh=xhigh max=max|forceAdaptiveThinking !supportsTemperature
anthropic/claude-sonnet-5-batch|1000000|128000|ri|1,5,0.1,1.25|xhigh=xhigh max=max|forceAdaptiveThinking !supportsTemperature
anthropic/claude-sonnet-5.5|1000000|128000|ri|2,10,0.1,2.5|xhigh=xhigh max=max|forceAdaptiveThinking !supportsTemperature
anthropic/claude-sonnet-5.5-batch|1000000|128000|ri|1,5,0.05,1.25|xhigh=xhigh max=max|forceAdaptiveThinking !supportsTemperature
deepseek/deepseek-r1|128000|8192|r|1.35,5.4,0,0
deepseek/deepseek-v4-flash|1000000|384000|r|0.13,0.26,0.028,0
deepseek/deepseek-v4-flash-0731|1000000|384000|r|0.13,0.26,0.028,0
deepseek/deepseek-v4-flash-vision-exp|1048576|1048576|ri|0.2156,0.6468,0.0068,0
deepseek/deepseek-v4-pro|1048600|1048600|r|1.32,3.96,0.132,0
deepseek/deepseek-v4-pro-0813|1000000|384000|r|0.66,1.98,0.066,0
deepseek/deepseek-v4.1-flash|1048576|32768|ri|0.3,1.2,0.007,0
deepseek/deepseek-v4.1-flash-1017|1048576|262144|ri|0.3,1.2,0.007,0
deepseek/deepseek-v4.1-flash-1017-fast|1048576|262144|ri|0.6,2.4,0.014,0
deepseek/deepseek-v4.1-flash-1017-ultrafast|1048576|1048576|ri|2.4,9.6,0.048,0
deepseek/deepseek-v4.1-flash-fast|1048576|32768|ri|0.6,2.4,0.014,0
google/gemini-2.5-flash|1000000|65535|ri|0.3,2.5,0.03,0
google/gemini-2.5-flash-batch|1000000|64000|ri|0.15,1.25,0.03,0
""",
"huggingface": """
deepseek-ai/DeepSeek-V3|64000|8192||0.4,1.3,0,0
deepseek-ai/DeepSeek-V3-0324|163840|163840||0.27,1.12,0,0
deepseek-ai/DeepSeek-V3.1|131072|8192|r|0.27,1,0,0
deepseek-ai/DeepSeek-V3.2|163840|65536|r|0.28,0.4,0,0
deepseek-ai/DeepSeek-V4-Flash|1048576|384000|r|0.14,0.28,0,0
deepseek-ai/DeepSeek-V4-Flash-0731|1048576|384000|r|0.14,0.28,0,0|off=- minimal=- low=- medium=- high=high xhigh=- max=max
deepseek-ai/DeepSeek-V4-Flash-Vision-Exp|1048576|384000|ri|0.44,1.32,0,0|off=- minimal=- low=low medium=- high=high xhigh=- max=max
deepseek-ai/DeepSeek-V4-Pro|1048576|393216|r|0.435,0.87,0.003625,0|off=- minimal=- low=- medium=- high=high xhigh=- max=-
deepseek-ai/DeepSeek-V4-Pro-0813|1000000|384000|r|1.32,3.96,0,0|off=- minimal=- low=low medium=- high=high xhigh=- max=max
deepseek-ai/DeepSeek-V4.1-Flash|1048576|384000|ri|0.3,1.2,0,0|off=none minimal=- low=low medium=- high=high xhigh=xhigh max=max
deepseek-ai/DeepSeek-V4.1-Flash-1017|1048576|384000|ri|0.3,1.2,0,0|off=- minimal=- low=low medium=- high=high xhigh=- max=max
MiniMaxAI/MiniMax-M1-80k|1000000|80000|r|0.55,2.2,0,0
MiniMaxAI/MiniMax-M2|204800|131072|r|0.3,1.2,0,0
MiniMaxAI/MiniMax-M2.1|204800|131072|r|0.3,1.2,0,0
MiniMaxAI/MiniMax-M2.5|204800|131072|r|0.3,1.2,0.03,0
MiniMaxAI/MiniMax-M2.7|204800|131072|r|0.3,1.2,0.06,0
MiniMaxAI/MiniMax-M3|524288|512000|ri|0.3,1.2,0,0
MiniMaxAI/MiniMax-M3.1-Flash|1000000|512000|ri|0.15,0.6,0,0|off=- minimal=- low=low medium=medium high=high xhigh=xhigh max=max
moonshotai/Kimi-K2-Instruct|131072|16384||1,3,0,0
moonshotai/Kimi-K2-Instruct-0905|262144|16384||1,3,0,0
moonshotai/Kimi-K2-Thinking|262144|262144|r|0.6,2.5,0.15,0
moonshotai/Kimi-K2.5|262144|262144|ri|0.6,3,0.1,0
moonshotai/Kimi-K2.6|262144|262144|ri|0.95,4,0.16,0
moonshotai/Kimi-K2.7-Code|262144|262144|ri|0.95,4,0,0
moonshotai/Kimi-K3|1000000|131072|ri|3,15,0,0|off=- minimal=- low=low medium=- high=high xhigh=- max=max
""",
"amazon-bedrock": """
amazon.nova-2-lite-v1:0|1000000|65535|ri|0.33,2.75,0.0825,0.33
amazon.nova-lite-v1:0|300000|10000|i|0.06,0.24,0.015,0.06
amazon.nova-micro-v1:0|128000|10000||0.035,0.14,0.00875,0.035
amazon.nova-pro-v1:0|300000|10000|i|0.8,3.2,0.2,0.8
eu.anthropic.claude-fable-5|1000000|128000|ri|11,55,1.1,13.75|off=- xhigh=xhigh max=max|supportsStrictMode
eu.anthropic.claude-haiku-4-5-20251001-v1:0|200000|64000|ri|1.1,5.5,0.11,1.375||supportsStrictMode
eu.anthropic.claude-haiku-5-5|1000000|128000|ri|0.11,0.55,0.011,0.1375|xhigh=xhigh max=max|supportsStrictMode
eu.anthropic.claude-opus-4-5-20251101-v1:0|200000|64000|ri|5.5,27.5,0.55,6.875||supportsStrictMode
eu.anthropic.claude-opus-4-6-v1|1000000|128000|ri|5.5,27.5,0.55,6.875|max=max|supportsStrictMode
eu.anthropic.claude-opus-4-7|1000000|128000|ri|5.5,27.5,0.55,6.875|xhigh=xhigh max=max|supportsStrictMode
eu.anthropic.claude-opus-4-8|1000000|128000|ri|5.5,27.5,0.55,6.875|xhigh=xhigh max=max|supportsStrictMode
eu.anthropic.claude-opus-5|1000000|128000|ri|5.5,27.5,0.55,6.875|xhigh=xhigh max=max|supportsStrictMode
eu.anthropic.claude-opus-5-5|1000000|128000|ri|4.4,22,0.22,5.5|xhigh=xhigh max=max|supportsStrictMode
eu.anthropic.claude-sonnet-4-20250514-v1:0|200000|64000|ri|3,15,0.3,3.75
eu.anthropic.claude-sonnet-4-5-20250929-v1:0|200000|64000|ri|3.3,16.5,0.33,4.125||supportsStrictMode
eu.anthropic.claude-sonnet-4-6|1000000|128000|ri|3.3,16.5,0.33,4.125|max=max|supportsStrictMode
eu.anthropic.claude-sonnet-5|1000000|128000|ri|2.2,11,0.22,2.75|xhigh=xhigh max=max|supportsStrictMode
eu.anthropic.claude-sonnet-5-5|1000000|128000|ri|2.2,11,0.11,2.75|xhigh=xhigh max=max|supportsStrictMode
global.anthropic.claude-fable-5|1000000|128000|ri|10,50,1,12.5|off=- xhigh=xhigh max=max|supportsStrictMode
global.anthropic.claude-fable-5-1|1000000|128000|ri|10,50,0.25,12.5|off=- xhigh=xhigh max=max|supportsStrictMode
global.anthropic.claude-fable-5-2|1000000|128000|ri|8,40,0.2,10|off=- xhigh=xhigh max=max|supportsStrictMode
global.anthropic.claude-haiku-4-5-20251001-v1:0|200000|64000|ri|1,5,0.1,1.25||supportsStrictMode
global.anthropic.claude-haiku-5-5|1000000|128000|ri|0.1,0.5,0.01,0.125|xhigh=xhigh max=max|supportsStrictMode
global.anthropic.claude-opus-4-5-20251101-v1:0|200000|64000|ri|5,25,0.5,6.25||supportsStrictMode
global.anthropic.claude-opus-4-6-v1|1000000|128000|ri|5,25,0.5,6.25|max=max|supportsStrictMode
global.anthropic.claude-opus-4-7|1000000|128000|ri|5,25,0.5,6.25|xhigh=xhigh max=max|supportsStrictMode
global.anthropic.claude-opus-4-8|1000000|128000|ri|5,25,0.5,6.25|xhigh=xhigh max=max|supportsStrictMode
global.anthropic.claude-opus-5|1000000|128000|ri|5,25,0.5,6.25|xhigh=xhigh max=max|supportsStrictMode
global.anthropic.claude-opus-5-5|1000000|128000|ri|4,20,0.2,5|xhigh=xhigh max=max|supportsStrictMode
global.anthropic.claude-sonnet-4-20250514-v1:0|200000|64000|ri|3,15,0.3,3.75
global.anthropic.claude-sonnet-4-5-20250929-v1:0|200000|64000|ri|3,15,0.3,3.75||supportsStrictMode
global.anthropic.claude-sonnet-4-6|1000000|128000|ri|3,15,0.3,3.75|max=max|supportsStrictMode
global.anthropic.claude-sonnet-5|1000000|128000|ri|2,10,0.2,2.5|xhigh=xhigh max=max|supportsStrictMode
global.anthropic.claude-sonnet-5-5|1000000|128000|ri|2,10,0.1,2.5|xhigh=xhigh max=max|supportsStrictMode
openai.gpt-5.4|1000000|128000|ri|2.75,16.5,0.275,0|xhigh=xhigh|supportsStrictMode
openai.gpt-5.5|1000000|128000|ri|5.5,33,0.55,0|xhigh=xhigh|supportsStrictMode
openai.gpt-5.6-luna|1050000|128000|ri|0.22,1.32,0.022,0.275|xhigh=xhigh|supportsStrictMode
openai.gpt-5.6-sol|1050000|128000|ri|4.4,22,0.44,5.5|xhigh=xhigh|supportsStrictMode
openai.gpt-5.6-terra|1050000|128000|ri|2.2,13.2,0.22,2.75|xhigh=xhigh|supportsStrictMode
openai.gpt-6-astra|1050000|128000|ri|11,55,1.1,13.75|xhigh=xhigh|supportsStrictMode
openai.gpt-6-luna|1050000|128000|ri|0.11,0.55,0.011,0.1375|xhigh=xhigh|supportsStrictMode
openai.gpt-6-sol|1050000|128000|ri|2.2,11,0.22,2.75|xhigh=xhigh|supportsStrictMode
openai.gpt-6.1-sol|1050000|128000|ri|2.2,11,0.11,2.75|xhigh=xhigh|supportsStrictMode
openai.gpt-6.1-terra|1050000|128000|ri|1.1,5.5,0.055,1.375|xhigh=xhigh|supportsStrictMode
openai.gpt-oss-120b|131072|131072|r|0.15,0.6,0,0||supportsStrictMode
openai.gpt-oss-120b-1:0|131072|128000|r|0.15,0.6,0,0||supportsStrictMode
openai.gpt-oss-20b|131072|131072|r|0.07,0.3,0,0||supportsStrictMode
openai.gpt-oss-20b-1:0|131072|128000|r|0.07,0.3,0,0||supportsStrictMode
openai.gpt-oss-safeguard-120b|128000|16384|r|0.15,0.6,0,0||supportsStrictMode
openai.gpt-oss-safeguard-20b|128000|16384|r|0.07,0.2,0,0||supportsStrictMode
us.amazon.nova-2-lite-v1:0|1000000|65535|ri|0.33,2.75,0.0825,0.33
us.amazon.nova-lite-v1:0|300000|10000|i|0.06,0.24,0.015,0.06
us.amazon.nova-micro-v1:0|128000|10000||0.035,0.14,0.00875,0.035
us.amazon.nova-premier-v1:0|1000000|10000|i|2.5,12.5,0.625,2.5
us.amazon.nova-pro-v1:0|300000|10000|i|0.8,3.2,0.2,0.8
us.anthropic.claude-fable-5|1000000|128000|ri|11,55,1.1,13.75|off=- xhigh=xhigh max=max|supportsStrictMode
us.anthropic.claude-fable-5-1|1000000|128000|ri|11,55,0.275,13.75|off=- xhigh=xhigh max=max|supportsStrictMode
us.anthropic.claude-fable-5-2|1000000|128000|ri|8.8,44,0.22,11|off=- xhigh=xhigh max=max|supportsStrictMode
us.anthropic.claude-haiku-4-5-20251001-v1:0|200000|64000|ri|1.1,5.5,0.11,1.375||supportsStrictMode
us.anthropic.claude-haiku-5-5|1000000|128000|ri|0.11,0.55,0.011,0.1375|xhigh=xhigh max=max|supportsStrictMode
us.anthropic.claude-opus-4-1-20250805-v1:0|200000|32000|ri|15,75,1.5,18.75
us.anthropic.claude-opus-4-5-20251101-v1:0|200000|64000|ri|5.5,27.5,0.55,6.875||supportsStrictMode
us.anthropic.claude-opus-4-6-v1|1000000|128000|ri|5.5,27.5,0.55,6.875|max=max|supportsStrictMode
us.anthropic.claude-opus-4-7|1000000|128000|ri|5.5,27.5,0.55,6.875|xhigh=xhigh max=max|supportsStrictMode
us.anthropic.claude-opus-4-8|1000000|128000|ri|5.5,27.5,0.55,6.875|xhigh=xhigh max=max|supportsStrictMode
us.anthropic.claude-opus-5|1000000|128000|ri|5.5,27.5,0.55,6.875|xhigh=xhigh max=max|supportsStrictMode
us.anthropic.claude-opus-5-5|1000000|128000|ri|4.4,22,0.22,5.5|xhigh=xhigh max=max|supportsStrictMode
us.anthropic.claude-sonnet-4-20250514-v1:0|200000|64000|ri|3,15,0.3,3.75
us.anthropic.claude-sonnet-4-5-20250929-v1:0|200000|64000|ri|3.3,16.5,0.33,4.125||supportsStrictMode
us.anthropic.claude-sonnet-4-6|1000000|128000|ri|3.3,16.5,0.33,4.125|max=max|supportsStrictMode
us.anthropic.claude-sonnet-5|1000000|128000|ri|2.2,11,0.22,2.75|xhigh=xhigh max=max|supportsStrictMode
us.anthropic.claude-sonnet-5-5|1000000|128000|ri|2.2,11,0.11,2.75|xhigh=xhigh max=max|supportsStrictMode
us.meta.llama3-1-70b-instruct-v1:0|128000|4096||0.72,0.72,0,0
us.meta.llama3-1-8b-instruct-v1:0|128000|4096||0.22,0.22,0,0
us.meta.llama3-3-70b-instruct-v1:0|128000|4096||0.72,0.72,0,0
us.meta.llama4-maverick-17b-instruct-v1:0|1000000|8192|i|0.24,0.97,0,0
us.meta.llama4-scout-17b-instruct-v1:0|10000000|8192|i|0.17,0.66,0,0
""",
"google-gemini-cli": """
gemini-2.5-flash|1048576|65536|ri|0.3,2.5,0.03,0
gemini-2.5-pro|1048576|65536|ri|1.25,10,0.125,0
gemini-3-flash-preview|1048576|65536|ri|0.5,3,0.05,0|off=- minimal=minimal low=low medium=medium high=high xhigh=- max=-
gemini-3-pro-preview|1048576|65536|ri
gemini-3.1-pro-preview|1048576|65536|ri|2,12,0.2,0|off=- minimal=- low=low medium=medium high=high xhigh=- max=-
gemini-2.5-flash-lite|1048576|65536|ri|0.1,0.4,0.01,0
""",
"google-antigravity": """
claude-opus-4-6-thinking|200000|64000|ri
claude-sonnet-4-6|200000|64000|ri
gemini-3-flash|1048576|65536|ri
gemini-3.1-pro-low|1048576|65536|ri
gpt-oss-120b-medium|131072|32768|r
""",
}


if __name__ == "__main__":
    sys.exit(main())
