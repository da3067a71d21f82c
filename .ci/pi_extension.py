#!/usr/bin/env python3
"""Tests pigateway's extension inside the real pi, offline, in a home folder of its own.

    python .ci/pi_extension.py PIGATEWAY --node-modules DIR [--node NODE] [--verbose]

PIGATEWAY is the path of pigateway.py; DIR holds @earendil-works/pi-coding-agent (its node_modules folder, or the folder
above). Exit status: 0 all is well, 1 something is not, 77 skipped: no such package, or no node new enough for it.
"""
from __future__ import annotations

import argparse
import contextlib
import hashlib
import http.server
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import traceback
import urllib.request
from typing import Any, Callable, Dict, Iterator, List, Optional

PACKAGE = os.path.join("@earendil-works", "pi-coding-agent")
PATIENCE_S = 15.0
COMMANDS = {"gateway:start", "gateway:stop", "gateway:status"}
TOOLS = {"gateway_start", "gateway_stop", "gateway_status"}
SCRIPT = ["gateway_status", "gateway_start", "gateway_start", "gateway_stop"]

OTHER_EXTENSION = """
export default function (pi) {
  for (const action of ["start", "stop", "status"]) {
    pi.registerCommand(`gateway:${action}`, { handler: async (_args, ctx) => ctx.ui.notify("from the other", "info") });
    pi.registerTool({ name: `gateway_${action}`, label: action, description: action,
      parameters: { type: "object", properties: {} }, execute: async () => ({ content: [], details: {} }) });
  }
}
"""


class Skip(Exception):
    """What the tests need is not here."""


class Place:
    """A home folder, pi and pigateway.py in it."""

    def __init__(self, pigateway: str, cli: str, node: str, home: str) -> None:
        self.pigateway, self.cli, self.node, self.home = pigateway, cli, node, home
        self.agent = os.path.join(home, ".pi", "agent")
        self.project = os.path.join(home, "project")
        os.makedirs(self.agent)
        os.makedirs(self.project)
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        self.write("gateway.json", {"port": self.port})
        keep = ("PATH", "SYSTEMROOT", "TEMP", "TMP", "TMPDIR", "LANG")
        self.environ = {**{name: os.environ[name] for name in keep if name in os.environ},
                        "HOME": home, "USERPROFILE": home, "PI_OFFLINE": "1", "PI_TELEMETRY": "0",
                        "PI_SKIP_VERSION_CHECK": "1", "TERM": "xterm-256color", "COLORTERM": "truecolor"}

    def write(self, name: str, content: Any) -> None:
        with open(os.path.join(self.agent, name), "w", encoding="utf-8") as file:
            json.dump(content, file)

    def run(self, *words: str) -> "subprocess.CompletedProcess[str]":
        return subprocess.run([sys.executable, self.pigateway, *words], env=self.environ, cwd=self.project, text=True,
                              stdin=subprocess.DEVNULL, capture_output=True, timeout=60)

    def status(self) -> Dict[str, Any]:
        return json.loads(self.run("status", "--json").stdout)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def is_up(self) -> bool:
        try:
            opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
            with opener.open(self.url + "/healthz", timeout=3) as reply:
                return reply.status == 200
        except OSError:
            return False

    def pi(self, *options: str) -> List[str]:
        return [self.node, self.cli, *options]

    def install(self, *options: str) -> "subprocess.CompletedProcess[str]":
        """The command that writes the extension."""
        return self.run("pi-extension", "--install", *options)

    @property
    def extension(self) -> str:
        folder = os.path.join(self.agent, "extensions")
        names = [name for name in os.listdir(folder) if name.endswith((".ts", ".js"))] if os.path.isdir(folder) else []
        expect(len(names) == 1, "one extension is installed", names)
        return os.path.join(folder, names[0])

    def variant(self, name: str, edit: Callable[[str], str]) -> str:
        """A copy of the extension with a change, to be loaded with --extension."""
        with open(self.extension, encoding="utf-8") as file:
            text = file.read()
        changed = edit(text)
        expect(changed != text, f"the text for the variant {name} is there", text)
        path = os.path.join(self.home, name)
        with open(path, "w", encoding="utf-8") as file:
            file.write(changed)
        return path


def expect(condition: Any, what: str, seen: Any = "") -> None:
    if not condition:
        raise AssertionError(f"{what}; seen: {str(seen)[-1500:]}")


def wait_for(what: str, find: Callable[[], Any], seen: Callable[[], Any] = str, patience: float = PATIENCE_S) -> Any:
    end = time.monotonic() + patience
    while time.monotonic() < end:
        found = find()
        if found:
            return found
        time.sleep(0.05)
    raise AssertionError(f"no {what} within {patience:g} s; seen: {str(seen())[-1500:]}")


def end_process(process: "subprocess.Popen[bytes]") -> None:
    if process.poll() is None:
        process.terminate()
        try:
            process.wait(5)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


class Rpc:
    """pi in RPC mode: what it asks of its user interface, and what it answers."""

    def __init__(self, place: Place, *options: str) -> None:
        self.records: List[Dict[str, Any]] = []
        self.errors = tempfile.TemporaryFile()
        self.process = subprocess.Popen(
            place.pi("--mode", "rpc", "--no-session", *options), env=place.environ, cwd=place.project,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.errors)
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        for line in self.process.stdout or ():
            self.records.append(json.loads(line))

    def ask(self, **command: Any) -> Dict[str, Any]:
        number = f"r{time.monotonic_ns()}"
        self.process.stdin.write(json.dumps({"id": number, **command}).encode() + b"\n")
        self.process.stdin.flush()

        def find() -> Optional[Dict[str, Any]]:
            return next((record for record in self.records
                         if record.get("type") == "response" and record.get("id") == number), None)

        return wait_for(f"answer to {command}", find, lambda: self.records)

    def command(self, line: str) -> Dict[str, Any]:
        """Types a command; the notification that it leads to."""
        before = len(self.records)
        answer = self.ask(type="prompt", message=line)
        expect(answer["success"], f"{line} is taken", answer)
        return wait_for(f"notification after {line}", lambda: next((record for record in self.records[before:]
                        if record.get("method") == "notify"), None), lambda: self.records[before:])

    @property
    def footers(self) -> List[Optional[str]]:
        return [record.get("statusText") for record in self.records if record.get("method") == "setStatus"]

    def footer(self, text: str) -> None:
        wait_for(f"footer {text!r}", lambda: self.footers and text in (self.footers[-1] or ""), lambda: self.footers)

    def close(self) -> None:
        """The end of its input ends pi in an orderly way."""
        with contextlib.suppress(OSError):
            self.process.stdin.close()
        try:
            code = self.process.wait(10)
        finally:
            end_process(self.process)
        self.errors.seek(0)
        errors = self.errors.read().decode("utf-8", "replace")
        self.errors.close()
        expect(code == 0, "pi ends in order", errors)
        expect("xtension error" not in errors, "no error of the extension is reported", errors)
        bad = [record for record in self.records if record.get("type") == "extension_error"]
        expect(not bad, "no extension error event", bad)


@contextlib.contextmanager
def rpc(place: Place, *options: str) -> Iterator[Rpc]:
    client = Rpc(place, *options)
    try:
        yield client
    except BaseException:
        end_process(client.process)
        raise
    client.close()


class ScriptedModel(http.server.BaseHTTPRequestHandler):
    """An OpenAI chat endpoint whose model calls the tools of the script, one after the other, then says done."""

    requests: List[Dict[str, Any]] = []
    protocol_version = "HTTP/1.1"

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        self.requests.append(body)
        turn = sum(message["role"] == "tool" for message in body["messages"])
        if turn < len(SCRIPT):
            call = {"index": 0, "id": f"call_{turn}", "type": "function",
                    "function": {"name": SCRIPT[turn], "arguments": "{}"}}
            delta, reason = {"role": "assistant", "tool_calls": [call]}, "tool_calls"
        else:
            delta, reason = {"role": "assistant", "content": "All done."}, "stop"
        chunks = [{"delta": delta, "finish_reason": None}, {"delta": {}, "finish_reason": reason}]
        lines = ["data: " + json.dumps({"id": "x", "object": "chat.completion.chunk", "created": 1, "model": "scripted",
                                        "choices": [{"index": 0, **chunk}]}) + "\n\n" for chunk in chunks]
        data = "".join([*lines, "data: [DONE]\n\n"]).encode()
        self.send_response(200)
        self.send_header("content-type", "text/event-stream")
        self.send_header("content-length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *words: Any) -> None:
        pass


class Screen:
    """pi's terminal interface in a pseudo-terminal."""

    def __init__(self, place: Place, *options: str) -> None:
        import fcntl
        import pty
        import struct
        import termios
        self.main, side = pty.openpty()
        fcntl.ioctl(side, termios.TIOCSWINSZ, struct.pack("HHHH", 40, 140, 0, 0))
        self.process = subprocess.Popen(place.pi("--no-session", *options), env=place.environ, cwd=place.project,
                                        stdin=side, stdout=side, stderr=side, start_new_session=True)
        os.close(side)
        self.received = b""
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                self.received += os.read(self.main, 65536)

    def text(self, start: int = 0) -> str:
        plain = re.sub(rb"\x1b\][^\x07\x1b]*(\x07|\x1b\\)|\x1b[\[(][0-9;?<>=]*[A-Za-z~]|\x1b[_P][^\x1b]*\x1b\\"
                       rb"|\x1b[=>]", b"", self.received[start:])
        return plain.decode("utf-8", "replace")

    def see(self, text: str, start: int = 0) -> None:
        wait_for(f"{text!r} on the screen", lambda: text in self.text(start), lambda: self.text(start))

    def type(self, line: str) -> int:
        """Types a line; where the output stood before."""
        before = len(self.received)
        os.write(self.main, line.encode())
        time.sleep(0.4)                         # the list of completions opens
        os.write(self.main, b"\r")
        return before

    def close(self) -> None:
        end_process(self.process)
        os.close(self.main)


def test_install(place: Place) -> None:
    """Written once, written again, not over somebody's edit, unless told to."""
    done = place.install()
    expect(done.returncode == 0, "it installs", done.stdout + done.stderr)
    path = place.extension
    with open(path, "rb") as file:
        text = file.read()
    expect(b"__PYTHON__" not in text and b"__PIGATEWAY__" not in text, "the places are filled in", text[:1500])
    expect(json.dumps(place.pigateway).encode() in text, "it names pigateway.py", text[:1500])
    expect(place.install().returncode == 0, "it installs again")
    with open(path, "ab") as file:
        file.write(b"// mine\n")
    done = place.install()
    expect(done.returncode not in (0, None) and done.stderr.strip(), "an edited file stays", done)
    with open(path, "rb") as file:
        expect(file.read().endswith(b"// mine\n"), "the edit is still there")
    done = place.install("--force")
    expect(done.returncode == 0, "--force replaces it", done.stderr)
    with open(path, "rb") as file:
        expect(file.read() == text, "it is as before")
    older = text.partition(b"\n")[2].replace(b"15_000", b"20_000")
    first = re.sub(rb"[0-9a-f]{16}", hashlib.sha256(older).hexdigest()[:16].encode(), text.partition(b"\n")[0])
    with open(path, "wb") as file:
        file.write(first + b"\n" + older)
    expect(place.install().returncode == 0, "an older one, as it was written, is replaced")
    with open(path, "rb") as file:
        expect(file.read() == text, "by the new one")
    expect(os.listdir(os.path.dirname(path)) == [os.path.basename(path)], "nothing else is left there")


def test_commands(place: Place) -> None:
    """The three commands and the footer; the gateway outlives the pi that started it."""
    url = place.url
    with rpc(place) as pi:
        pi.footer("Gateway: stopped")
        names = {command["name"] for command in pi.ask(type="get_commands")["data"]["commands"]}
        expect(COMMANDS <= names, "the commands are there", names)
        told = pi.command("/gateway:status")
        expect(told["notifyType"] == "info" and "stopped" in told["message"], "it is stopped", told)
        told = pi.command("/gateway:stop")
        expect(told["notifyType"] == "warning", "stopping what does not run is a warning", told)
        told = pi.command("/gateway:start --no-such-flag")
        expect(told["notifyType"] == "error" and "no-such-flag" in told["message"], "a failure is told", told)
        told = pi.command("/gateway:start")
        status = place.status()
        expect(status["running"] and place.is_up(), "it runs", (told, status))
        for word in (url, f"pid {status['pid']}", f"{status['models']} model"):
            expect(word in told["message"], f"{word} is told", told)
        pi.footer(f"Gateway: running · {url} · {status['models']} model")
        told = pi.command("/gateway:start")
        expect(told["notifyType"] == "warning" and str(status["pid"]) in told["message"], "it runs already", told)
        told = pi.command("/gateway:status")
        expect(told["notifyType"] == "info" and url in told["message"], "status", told)
    expect(place.is_up(), "it goes on after the end of pi")
    with rpc(place) as pi:
        pi.footer(f"Gateway: running · {url}")
        expect("stopped" in pi.command("/gateway:stop")["message"], "stop", pi.records)
        pi.footer("Gateway: stopped")
        expect(not place.is_up() and not place.status()["running"], "it is gone", pi.records)
    expect(pi.footers[-1] is None, "the footer is cleared at the end", pi.footers)


def test_refresh(place: Place) -> None:
    """The footer follows what others do, and keeps doing so in the session after /new."""
    path = place.variant("quick.ts", lambda text: text.replace("REFRESH_MS = 15_000", "REFRESH_MS = 3_000"))
    with rpc(place, "--no-extensions", "--extension", path) as pi:
        pi.footer("Gateway: stopped")
        expect(place.run("start").returncode == 0, "it starts")
        pi.footer("Gateway: running")
        expect(pi.ask(type="new_session")["success"], "a new session")
        before = len(pi.footers)
        wait_for("footer in the new session", lambda: "Gateway: running" in str(pi.footers[before:]),
                 lambda: pi.footers)
        expect(place.run("stop").returncode == 0, "it stops")
        pi.footer("Gateway: stopped")


def test_tools(place: Place) -> None:
    """A model calls the tools."""
    ScriptedModel.requests = []
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), ScriptedModel)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    place.write("models.json", {"providers": {"scripted": {
        "baseUrl": f"http://127.0.0.1:{server.server_address[1]}/v1", "api": "openai-completions", "apiKey": "none",
        "models": [{"id": "scripted", "contextWindow": 100000, "maxTokens": 1000}]}}})
    try:
        with rpc(place, "--model", "scripted/scripted") as pi:
            pi.footer("Gateway: stopped")
            before = len(pi.footers)
            pi.ask(type="prompt", message="Start and stop the gateway.")
            wait_for("end of the run", lambda: any(record.get("type") == "agent_settled" for record in pi.records),
                     lambda: pi.records, 30)
            wait_for("footers", lambda: [f for f in pi.footers[before:] if "running" in str(f)], lambda: pi.footers)
        ends = [record for record in pi.records if record.get("type") == "tool_execution_end"]
        expect([end["toolName"] for end in ends] == SCRIPT, "the tools ran", ends)
        expect(not any(end["isError"] for end in ends), "no tool failed", ends)
        declared = {tool["function"]["name"] for tool in ScriptedModel.requests[0]["tools"]}
        expect(TOOLS <= declared, "the tools are declared to the model", declared)
        results = [str(message["content"]) for message in ScriptedModel.requests[-1]["messages"]
                   if message["role"] == "tool"]
        for result, word in zip(results, ("stopped", place.url, place.url, "stopped")):
            expect(word in result, f"the model reads {word}", results)
        expect(not place.is_up(), "it is stopped")
    finally:
        server.shutdown()
        server.server_close()
        os.unlink(os.path.join(place.agent, "models.json"))


def test_failures(place: Place) -> None:
    """Without Python, without pigateway.py, with one that says nonsense or never answers: told, and pi goes on."""
    nonsense, silent = os.path.join(place.home, "nonsense.py"), os.path.join(place.home, "silent.py")
    for path, text in ((nonsense, "print('hello')"), (silent, "import time; time.sleep(60)")):
        with open(path, "w", encoding="utf-8") as file:
            file.write(text)
    ours = json.dumps(place.pigateway)
    variants = {
        "python": (lambda text: text.replace(json.dumps(sys.executable), '"/no/such/python"'), "not found"),
        "script": (lambda text: text.replace(ours, '"/no/such/pigateway.py"'), "No such file"),
        "nonsense": (lambda text: text.replace(ours, json.dumps(nonsense)), "not understood"),
        "silent": (lambda text: text.replace(ours, json.dumps(silent)).replace("10_000", "500").replace(
            "60_000", "500"), "no answer within"),
    }
    paths = [place.variant(f"{name}.ts", edit) for name, (edit, words) in variants.items()]
    with rpc(place, "--no-extensions", *(word for path in paths for word in ("--extension", path))) as pi:
        pi.footer("Gateway: unknown")
        for number, (name, (edit, words)) in enumerate(variants.items(), 1):     # pi numbers commands of the same name
            for command in ("status", "start") if name != "nonsense" else ("status",):
                told = pi.command(f"/gateway:{command}:{number}")
                expect(told["notifyType"] == "error" and words in told["message"], f"{name}, {command}: told", told)
        expect(pi.ask(type="get_state")["success"], "pi goes on")


def test_beside_another(place: Place) -> None:
    """With another extension that has tools and commands of the same names, as pi-gateway's has, pi still starts."""
    path = os.path.join(place.home, "other.ts")
    with open(path, "w", encoding="utf-8") as file:
        file.write(OTHER_EXTENSION)
    with rpc(place, "--extension", path) as pi:
        pi.footer("Gateway: stopped")
        names = {command["name"] for command in pi.ask(type="get_commands")["data"]["commands"]}
        expect({f"{name}:{number}" for name in COMMANDS for number in (1, 2)} <= names, "both have commands", names)
        told = [pi.command(f"/gateway:status:{number}")["message"] for number in (1, 2)]
        expect(sorted(told) == ["Gateway: stopped", "from the other"], "both work", told)


def test_print_mode(place: Place) -> None:
    """pi -p "/gateway:status" has no interface: the answer goes to standard error, and no timer keeps pi alive."""
    done = subprocess.run(place.pi("--no-session", "-p", "/gateway:status"), env=place.environ, cwd=place.project,
                          stdin=subprocess.DEVNULL, capture_output=True, text=True, encoding="utf-8", timeout=30)
    expect("Gateway: stopped" in done.stderr, "the status is told", (done.returncode, done.stdout, done.stderr))


def test_screen(place: Place) -> None:
    """In a terminal."""
    if os.name != "posix":
        return
    screen = Screen(place)
    try:
        screen.see("Gateway: stopped")
        before = screen.type("/gateway:start")
        screen.see(f"Gateway: running · {place.url}", before)
        screen.see("pid ", before)
        expect(place.is_up(), "it runs", screen.text())
        before = screen.type("/gateway:stop")
        screen.see("Gateway: stopped", before)
        expect(not place.is_up(), "it is stopped", screen.text())
        screen.type("/quit")
        expect(screen.process.wait(10) == 0, "pi ends", screen.text())
    finally:
        screen.close()


TESTS = [test_install, test_commands, test_refresh, test_tools, test_failures, test_beside_another, test_print_mode,
         test_screen]


def find_pi(folder: str) -> str:
    for base in (folder, os.path.join(folder, "node_modules")):
        for script in ("bundle", ""):
            cli = os.path.join(base, PACKAGE, "dist", script, "cli.js")
            if os.path.exists(cli):
                return os.path.abspath(cli)
    raise Skip(f"no {PACKAGE} in {folder}")


def find_node(asked: Optional[str], folder: str) -> str:
    """The asked one, the one of the npm package called node, or the machine's: the first that is new enough."""
    names = [asked] if asked else [os.path.join(folder, *middle, "node", "bin", "node")
                                   for middle in ((), ("node_modules",))] + [shutil.which("node") or ""]
    for name in filter(None, names):
        with contextlib.suppress(OSError, ValueError):
            version = subprocess.run([name, "--version"], capture_output=True, text=True, timeout=30).stdout
            if tuple(map(int, version.strip().lstrip("v").split(".")[:2])) >= (22, 19):
                return os.path.abspath(name)
    raise Skip("no node of version 22.19 or newer")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pigateway")
    parser.add_argument("--node-modules", required=True, metavar="DIR")
    parser.add_argument("--node", metavar="NODE")
    parser.add_argument("--verbose", action="store_true")
    arguments = parser.parse_args()
    try:
        cli, node = find_pi(arguments.node_modules), find_node(arguments.node, arguments.node_modules)
    except Skip as reason:
        print(f"skipped: {reason}")
        return 77
    failed = 0
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) if sys.version_info >= (3, 10) else \
            tempfile.TemporaryDirectory() as home:
        place = Place(os.path.abspath(arguments.pigateway), cli, node, os.path.realpath(home))
        for test in TESTS:
            began = time.monotonic()
            try:
                test(place)
            except Exception as error:
                failed += 1
                print(f"FAILED  {test.__name__}: {error}")
                if arguments.verbose:
                    traceback.print_exc()
            else:
                print(f"ok      {test.__name__} ({time.monotonic() - began:.1f} s)", flush=True)
            finally:
                with contextlib.suppress(Exception):    # what a failed test left running
                    pid = place.status()["pid"] if place.is_up() else 0
                    if pid and place.run("stop").returncode:
                        os.kill(pid, signal.SIGTERM)
    print(f"{len(TESTS) - failed} of {len(TESTS)} passed")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
