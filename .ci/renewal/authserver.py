"""A small local world for tests of OAuth log-ins: a CONNECT proxy that ends TLS itself and answers as the authorization
servers and the APIs of two subscriptions (anthropic, openai-codex), and as one provider with an API key (groq).

Refresh tokens rotate: one that was used is refused for ever with invalid_grant, and counted. The APIs take only tokens
that were really issued and are not long expired. `python authserver.py FOLDER` runs it alone, with an auth.json to use.
"""
import base64
import collections
import http.server
import json
import os
import secrets
import socket
import ssl
import subprocess
import sys
import threading
import time
import urllib.parse
from typing import Any, Callable, Dict, List, Optional, Tuple

MARK = "Zz9qToken"                      # in the secret part of every token, so that a leak is easy to find
JWT_HEAD = base64.urlsafe_b64encode(b'{"alg":"RS256","typ":"JWT"}').decode().rstrip("=")
GROQ_KEY = "gsk_rig" + MARK
HOSTS = ("platform.claude.com", "auth.openai.com", "api.anthropic.com", "chatgpt.com", "api.groq.com")
CLIENT_IDS = {"anthropic": "9d1c250a-e61b-44d9-88ed-5944d1962f5e", "openai-codex": "app_EMoamEEZ73f0CkXaXp7hrann"}
MARGIN_S = {"anthropic": 300, "openai-codex": 0}        # what clients take off the life before they store `expires`


class Drop(Exception):
    """Raised by a hook: the connection ends without an answer."""


class Give(Exception):
    """Raised by a hook: this answer (status, JSON object or bytes, headers) instead of the usual one; with status 0,
    one that comes in drops: (pause, bytes) pairs."""

    def __init__(self, status: int, body: Any, headers: Optional[Dict[str, str]] = None) -> None:
        super().__init__(status)
        self.status, self.body, self.headers = status, body, headers or {}


class Account:
    """One log-in at one provider, and what was done with it."""

    def __init__(self, provider: str) -> None:
        self.provider = provider
        self.lock = threading.Lock()
        self.life = lambda: 3600.0      # expires_in of the next token
        self.grace_s = 10.0             # an access token is taken so long after its end
        self.superseded_s = 1e9         # ... and so long after the next one was issued
        self.reuse_s = 0.0              # for so long a used refresh token gives the same answer again
        self.before: Optional[Callable[[], None]] = None      # runs before a rotation; may sleep or raise Drop, Give
        self.after: Optional[Callable[[], None]] = None       # ... between rotation and answer
        self.openai_errors = False      # the error object of OpenAI instead of the one in RFC 6749
        self.refresh_token = ""
        self.used: Dict[str, Tuple[float, Dict[str, Any]]] = {}
        self.issued: Dict[str, List[float]] = {}              # access token -> [issued, ends, superseded]
        self.number = 0
        self.refreshed = self.refused = self.malformed = self.asked = 0
        self.calls = self.calls_refused = self.in_flight = self.most_in_flight = 0
        self.agents: Dict[str, int] = collections.Counter()
        self.problems: List[str] = []
        self.times: List[float] = []

    def issue(self) -> Dict[str, Any]:
        """A new pair of tokens, as the authorization server answers it; the old refresh token is dead."""
        with self.lock:
            return self._issue()

    def _issue(self) -> Dict[str, Any]:
        now, life = time.time(), self.life()
        for facts in self.issued.values():
            facts[2] = min(facts[2], now)
        self.number += 1
        seal = f"{MARK}{self.number:05d}{secrets.token_hex(12)}"
        if self.provider == "anthropic":
            access, refresh = f"sk-ant-oat01-{seal}AA", f"sk-ant-ort01-{seal}AA"
        else:
            claims = {"https://api.openai.com/auth": {"chatgpt_account_id": "acct-rig"}, "exp": int(now + life)}
            body = base64.urlsafe_b64encode(json.dumps(claims).encode()).decode().rstrip("=")
            access, refresh = f"{JWT_HEAD}.{body}.{seal}", f"rt_{seal}"
        self.issued[access] = [now, now + life, 1e18]
        self.refresh_token = refresh
        return {"access_token": access, "refresh_token": refresh, "token_type": "Bearer",
                "expires_in": int(life) if life >= 1 else life}

    def entry(self, **extra: Any) -> Dict[str, Any]:
        """A new log-in as a client stores it."""
        answer = self.issue()
        expires = int((time.time() + answer["expires_in"] - MARGIN_S[self.provider]) * 1000)
        fields = {"accountId": "acct-rig"} if self.provider == "openai-codex" else {}
        return {"type": "oauth", "refresh": answer["refresh_token"], "access": answer["access_token"],
                "expires": expires, **fields, **extra}

    def refuse(self) -> Give:
        if self.openai_errors:
            return Give(401, {"error": {"message": "Your refresh token has already been used to generate a new access "
                        "token. Please try signing in again.", "type": "invalid_request_error", "param": None,
                        "code": "refresh_token_reused"}})
        return Give(400, {"error": "invalid_grant", "error_description": "Refresh token not found or invalid"})

    def refresh(self, form: Dict[str, Any], agent: str) -> Dict[str, Any]:
        """The refresh grant. Raises Give, Drop."""
        with self.lock:
            self.asked += 1
            self.agents[agent] += 1
            self.in_flight += 1
            self.most_in_flight = max(self.most_in_flight, self.in_flight)
            self.times.append(time.time())
        try:
            if form.get("grant_type") != "refresh_token" or form.get("client_id") != CLIENT_IDS[self.provider] \
                    or "scope" in form:
                self.malformed += 1
                self.problems.append(f"refresh with fields {sorted(form)}")
                raise Give(400, {"error": "invalid_request"})
            if self.before:
                self.before()
            with self.lock:
                token, now = form.get("refresh_token", ""), time.time()
                if token in self.used and now < self.used[token][0] + self.reuse_s:
                    answer = self.used[token][1]
                elif token != self.refresh_token:
                    self.refused += 1
                    raise self.refuse()
                else:
                    answer = self._issue()
                    self.used[token] = now, answer
                    self.refreshed += 1
            if self.after:
                self.after()
            return answer
        finally:
            with self.lock:
                self.in_flight -= 1

    def call(self, token: str) -> None:
        """An API call with that access token. Raises Give when it is refused."""
        with self.lock:
            self.calls += 1
            _, ends, superseded = self.issued.get(token, (0, 0, 0))
            now = time.time()
            if now < ends + self.grace_s and now < superseded + self.superseded_s:
                return
            self.calls_refused += 1
            why = "unknown" if not ends else "expired" if now >= ends + self.grace_s else "superseded"
            self.problems.append(f"API call with a token that is {why} ({now - ends:.1f} s after its end)")
        error = {"type": "error", "error": {"type": "authentication_error", "message": "OAuth token has expired"}}
        raise Give(401, error if self.provider == "anthropic" else {"detail": "Unauthorized"})


def make_certificates(folder: str) -> Tuple[str, str]:
    """(authority's certificate, host certificate with its key), made by the `openssl` program."""
    def openssl(*arguments: str) -> None:
        subprocess.run(["openssl", *arguments], check=True, cwd=folder, timeout=60, stdout=subprocess.DEVNULL,
                       stderr=subprocess.DEVNULL)

    with open(os.path.join(folder, "rig.cnf"), "w", encoding="ascii") as file:
        file.write("[req]\ndistinguished_name=dn\nprompt=no\n[dn]\nCN=pigateway rig\n[ca]\n"
                   "basicConstraints=critical,CA:TRUE\nkeyUsage=critical,keyCertSign,cRLSign\n"
                   "subjectKeyIdentifier=hash\n[host]\nbasicConstraints=critical,CA:FALSE\n"
                   "keyUsage=critical,digitalSignature\nextendedKeyUsage=serverAuth\nsubjectKeyIdentifier=hash\n"
                   "authorityKeyIdentifier=keyid\nsubjectAltName=" + ",".join(f"DNS:{host}" for host in HOSTS) + "\n")
    for name in ("ca", "host"):
        openssl("ecparam", "-name", "prime256v1", "-genkey", "-noout", "-out", f"{name}.key")
    openssl("req", "-x509", "-new", "-key", "ca.key", "-config", "rig.cnf", "-extensions", "ca", "-days", "2",
            "-subj", "/CN=pigateway rig CA", "-out", "ca.pem")
    openssl("req", "-new", "-key", "host.key", "-config", "rig.cnf", "-out", "host.csr")
    openssl("x509", "-req", "-in", "host.csr", "-CA", "ca.pem", "-CAkey", "ca.key", "-set_serial", "7", "-days", "2",
            "-extfile", "rig.cnf", "-extensions", "host", "-out", "host.crt")
    with open(os.path.join(folder, "host.pem"), "w", encoding="ascii") as out:
        for name in ("host.key", "host.crt"):
            with open(os.path.join(folder, name), encoding="ascii") as part:
                out.write(part.read())
    return os.path.join(folder, "ca.pem"), os.path.join(folder, "host.pem")


def codex_events(text: str) -> bytes:
    item = {"type": "message", "id": "msg_1", "role": "assistant", "status": "completed",
            "content": [{"type": "output_text", "text": text, "annotations": []}]}
    place = {"item_id": "msg_1", "output_index": 0, "content_index": 0}
    response = {"id": "resp_1", "object": "response", "created_at": 1, "model": "m", "status": "completed",
                "output": [item], "usage": {"input_tokens": 3, "output_tokens": 1, "total_tokens": 4}}
    events = [{"type": "response.created", "response": {**response, "status": "in_progress", "output": []}},
              {"type": "response.output_item.added", "output_index": 0, "item": {**item, "content": []}},
              {"type": "response.content_part.added", **place, "part": {"type": "output_text", "text": ""}},
              {"type": "response.output_text.delta", **place, "delta": text},
              {"type": "response.output_text.done", **place, "text": text},
              {"type": "response.output_item.done", "output_index": 0, "item": item},
              {"type": "response.completed", "response": response}]
    return b"".join(b"data: " + json.dumps(event).encode() + b"\n\n" for event in events)


def claude_events(message: Dict[str, Any], text: str) -> bytes:
    events = [{"type": "message_start", "message": {**message, "content": [], "stop_reason": None}},
              {"type": "content_block_start", "index": 0, "content_block": {"type": "text", "text": ""}},
              {"type": "content_block_delta", "index": 0, "delta": {"type": "text_delta", "text": text}},
              {"type": "content_block_stop", "index": 0},
              {"type": "message_delta", "delta": {"stop_reason": "end_turn", "stop_sequence": None},
               "usage": {"output_tokens": 1}}, {"type": "message_stop"}]
    return b"".join(b"event: %b\ndata: %b\n\n" % (event["type"].encode(), json.dumps(event).encode())
                    for event in events)


class World:
    """All of it, behind one proxy URL."""

    def __init__(self, certificates: Tuple[str, str]) -> None:
        self.authority, certificate = certificates
        self.accounts = {name: Account(name) for name in CLIENT_IDS}
        self.strays: List[str] = []
        self.groq_calls = 0
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(certificate)
        world = self

        class Handler(http.server.BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"
            disable_nagle_algorithm = True
            tunnel = ""

            def log_message(self, *_: Any) -> None:
                pass

            def do_CONNECT(self) -> None:
                self.tunnel = self.path.rpartition(":")[0]
                if self.tunnel not in HOSTS:
                    world.strays.append(self.tunnel)
                    self.send_error(403, "no such host here")
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
                try:
                    body = self.rfile.read(int(self.headers.get("content-length") or 0))
                    status, kind, content, headers = 200, "application/json", b"", {}
                    try:
                        kind, content = world.answer(self.tunnel, self.path, self.headers, body)
                    except Give as other:
                        status, headers = other.status, other.headers
                        drops = content = other.body
                        if status and not isinstance(content, bytes):
                            content = json.dumps(content).encode()
                    except Drop:
                        self.close_connection = True
                        self.connection.shutdown(socket.SHUT_RDWR)
                        return
                    if status == 0:             # a body that comes in drops: (pause, bytes) pairs
                        self.wfile.write(b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\n\r\n")
                        for pause_s, piece in drops:
                            time.sleep(pause_s)
                            self.wfile.write(piece)
                        self.close_connection = True
                        self.connection.shutdown(socket.SHUT_RDWR)
                        return
                    self.send_response(status)
                    for name, value in {"content-type": kind, "content-length": str(len(content)), **headers}.items():
                        self.send_header(name, value)
                    self.end_headers()
                    self.wfile.write(content)
                except OSError:                 # the client was killed, or gave up
                    self.close_connection = True

            do_GET = do_POST

            def handle_one_request(self) -> None:
                try:
                    super().handle_one_request()
                except OSError:
                    self.close_connection = True

            def finish(self) -> None:
                try:
                    super().finish()
                except (OSError, ValueError):
                    pass
                self.connection.close()

        class Server(http.server.ThreadingHTTPServer):
            daemon_threads = True
            request_queue_size = 256

            def handle_error(self, request: Any, client_address: Any) -> None:
                pass

        self.server = Server(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}"
        threading.Thread(target=self.server.serve_forever, args=(0.05,), daemon=True).start()

    def close(self) -> None:
        self.server.shutdown()
        self.server.server_close()

    def answer(self, host: str, path: str, headers: Any, body: bytes) -> Tuple[str, bytes]:
        """(content type, body) of an answer with status 200. Raises Give, Drop."""
        path = path.partition("?")[0]
        kind = (headers.get("content-type") or "").partition(";")[0]
        agent = headers.get("user-agent") or "-"
        agent = "gateway" if "python" in agent.lower() or "pigateway" in agent.lower() else \
            "pi" if agent in ("node", "undici", "-") else agent
        if (host, path) == ("platform.claude.com", "/v1/oauth/token"):
            account = self.accounts["anthropic"]
            if kind != "application/json":
                account.malformed += 1
                raise Give(400, {"error": "invalid_request"})
            return "application/json", json.dumps(account.refresh(json.loads(body), agent)).encode()
        if (host, path) == ("auth.openai.com", "/oauth/token"):
            account = self.accounts["openai-codex"]
            if kind != "application/x-www-form-urlencoded":
                account.malformed += 1
                raise Give(400, {"error": "invalid_request"})
            form = dict(urllib.parse.parse_qsl(body.decode(), keep_blank_values=True))
            return "application/json", json.dumps(account.refresh(form, agent)).encode()
        scheme, _, token = (headers.get("authorization") or "").partition(" ")
        if (host, path) == ("api.anthropic.com", "/v1/messages"):
            account = self.accounts["anthropic"]
            if scheme != "Bearer" or headers.get("x-api-key") or \
                    "oauth-2025-04-20" not in (headers.get("anthropic-beta") or ""):
                account.problems.append("API call without the marks of a subscription")
                raise Give(401, {"type": "error", "error": {"type": "authentication_error", "message": "no OAuth"}})
            account.call(token)
            asked, text = json.loads(body), "pong-anthropic"
            message = {"id": "msg_1", "type": "message", "role": "assistant", "model": asked.get("model"),
                       "content": [{"type": "text", "text": text}], "stop_reason": "end_turn", "stop_sequence": None,
                       "usage": {"input_tokens": 3, "output_tokens": 1}}
            if asked.get("stream"):
                return "text/event-stream", claude_events(message, text)
            return "application/json", json.dumps(message).encode()
        if (host, path) == ("chatgpt.com", "/backend-api/codex/responses"):
            self.accounts["openai-codex"].call(token)
            return "text/event-stream", codex_events("pong-openai-codex")
        if (host, path) == ("api.groq.com", "/openai/v1/chat/completions"):
            if token != GROQ_KEY:
                raise Give(401, {"error": {"message": "Invalid API Key"}})
            self.groq_calls += 1
            reply = {"id": "c1", "object": "chat.completion", "created": 1, "model": "m", "choices": [
                {"index": 0, "message": {"role": "assistant", "content": "pong-groq"}, "finish_reason": "stop"}],
                "usage": {"prompt_tokens": 3, "completion_tokens": 1, "total_tokens": 4}}
            return "application/json", json.dumps(reply).encode()
        raise Give(404, {"error": {"message": "nothing here"}})


def main() -> None:
    folder = os.path.abspath(sys.argv[1])
    os.makedirs(folder, mode=0o700, exist_ok=True)
    world = World(make_certificates(folder))
    life = float(sys.argv[2]) if len(sys.argv) > 2 else 605.0
    for account in world.accounts.values():
        account.life = lambda: life
    path = os.path.join(folder, "auth.json")
    with open(os.open(path, os.O_CREAT | os.O_WRONLY | os.O_TRUNC, 0o600), "w", encoding="utf-8") as file:
        json.dump({name: account.entry() for name, account in world.accounts.items()}, file, indent=2)
    print(f"export HTTPS_PROXY={world.url} SSL_CERT_FILE={world.authority} NODE_EXTRA_CA_CERTS={world.authority} "
          f"PI_CODING_AGENT_DIR={folder} NO_PROXY=127.0.0.1,localhost", flush=True)
    while True:
        time.sleep(5)
        for name, account in world.accounts.items():
            print(name, "refreshed", account.refreshed, "refused", account.refused, "calls", account.calls,
                  "calls refused", account.calls_refused, account.problems[-3:], flush=True)


if __name__ == "__main__":
    main()
