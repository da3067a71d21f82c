#!/usr/bin/env python3
"""Tests pigateway with the real Claude Code, offline, on scripted providers of four protocols.

    python .ci/claude_code.py PIGATEWAY [--claude CLAUDE] [--only WORD ...]

PIGATEWAY is the path of pigateway.py; `claude` is looked for on PATH. Exit status: 0 all is well, 1 something is not,
77 skipped: no Claude Code. The providers refuse what their vendors would: calls and results that do not pair up, fields
of another protocol, Anthropic's accounting line, another provider's thinking.
"""
from __future__ import annotations

import argparse
import base64
import contextlib
import functools
import http.server
import json
import os
import re
import select
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from typing import Any, Callable, Dict, List, Sequence, Tuple

from claude_code_providers import WIRES, Turn, check_request, expect

PATIENCE_S = 60.0
SUMMARY = "The user noted an early fact."
PROGRAM = "print('hello world')\n# naïve – “ü”\n"
PNG = base64.b64decode("iVBORw0KGgoAAAANSUhEUgAAACAAAAAgCAIAAAD8GO2jAAAAKUlEQVR4nO3NMQ0AAAgDsEmZf5OggoOkSf9m2lMRCA"
                       "QCgUAgEAgEX4IFDbP8PQv8HGkAAAAASUVORK5CYII=")


def wait_for(what: str, find: Callable[[], Any], seen: Callable[[], Any] = str) -> None:
    end = time.monotonic() + PATIENCE_S
    while not find():
        expect(time.monotonic() < end, f"no {what} within {PATIENCE_S:g} s", seen())
        time.sleep(0.05)


class Place:
    """A home folder, four providers on one port, pigateway before them."""

    def __init__(self, pigateway: str, claude: str, home: str, wire: Any) -> None:
        self.home, self.claude, self.work = home, claude, os.path.join(home, "work")
        self.seen: List[Tuple[Any, str, List[Turn]]] = []
        self.faults: List[str] = []
        self.cuts: List[float] = []
        os.makedirs(os.path.join(home, ".pi", "agent"))
        os.mkdir(self.work)
        provider = type("Provider", (http.server.BaseHTTPRequestHandler,), {
            "do_POST": lambda handler: self.serve(handler), "log_message": lambda *words: None})
        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), provider)
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        url = f"http://127.0.0.1:{self.server.server_address[1]}"
        facts = {"reasoning": True, "input": ["text", "image"], "contextWindow": 200000, "maxTokens": 32000}
        self.write(".pi/agent/models.json", {"providers": {one.name: {
            "baseUrl": f"{url}/{one.name}{one.base}", "api": one.api, "apiKey": "none",
            "models": [{**facts, **one.model}]} for one in WIRES}})
        self.write(".claude.json", {"hasCompletedOnboarding": True, "theme": "dark", "projects": {self.work: {
            "hasTrustDialogAccepted": True, "hasCompletedProjectOnboarding": True}}})
        self.write("work/other.txt", "the marker is m4rk3r-7")
        with open(self.path("red.png"), "wb") as file:
            file.write(PNG)
        self.use(wire)
        keep = ("PATH", "LANG", "TMPDIR")
        self.environ = {**{name: os.environ[name] for name in keep if name in os.environ}, "HOME": home,
                        "ANTHROPIC_BASE_URL": f"http://127.0.0.1:{port}", "ANTHROPIC_AUTH_TOKEN": "x",
                        "CLAUDE_CODE_MAX_RETRIES": "1", "CLAUDE_CODE_DISABLE_NONESSENTIAL_TRAFFIC": "1",
                        "DISABLE_AUTOUPDATER": "1", "TERM": "xterm-256color", "NO_PROXY": "*", "no_proxy": "*"}
        with open(os.path.join(home, "log"), "wb") as log:
            self.gateway = subprocess.Popen([sys.executable, pigateway, "--port", str(port)], env=self.environ,
                                            stdin=subprocess.DEVNULL, stdout=log, stderr=log)
        wait_for("gateway that answers", self.is_up)

    def is_up(self) -> bool:
        url, opener = self.environ["ANTHROPIC_BASE_URL"], urllib.request.build_opener(urllib.request.ProxyHandler({}))
        with contextlib.suppress(OSError), opener.open(url + "/healthz", timeout=3) as reply:
            return bool(reply.status == 200)
        return False

    def path(self, name: str) -> str:
        return os.path.join(self.work, name)

    def write(self, name: str, content: Any) -> None:
        with open(os.path.join(self.home, name), "w", encoding="utf-8") as file:
            json.dump(content, file)

    def use(self, wire: Any) -> None:
        """All names of models mean this provider's."""
        self.write(".pi/agent/pigateway.json", {"modelMap": {"default": f"{wire.name}/{wire.model['id']}"}})

    def serve(self, handler: http.server.BaseHTTPRequestHandler) -> None:
        raw = handler.rfile.read(int(handler.headers["content-length"]))
        _, name, path = handler.path.partition("?")[0].split("/", 2)
        wire = next(wire for wire in WIRES if wire.name == name)
        error = wire.overflow
        try:
            expect("/" + path == wire.path, "the right path", path)
            turns, tools = wire.read(json.loads(raw))
            self.check(wire, raw, turns, tools)
            parts = self.play(wire, turns, tools)
        except Exception as reason:
            self.faults.append(f"{name}: {type(reason).__name__}: {reason}")
            parts, error = [], {"type": "invalid_request_error", "message": "refused"}
        frames = wire.answer(parts) if parts else [json.dumps({"type": "error", "error": error}).encode()]
        handler.send_response(200 if parts else 400)
        handler.send_header("content-type", "text/event-stream" if parts else "application/json")
        handler.end_headers()                   # HTTP/1.0: the end of the connection is the end of the answer
        try:
            for frame in frames:
                if select.select([handler.connection], [], [], 0)[0]:
                    raise ConnectionError
                handler.wfile.write(frame)
        except OSError:
            self.cuts.append(time.monotonic())

    def check(self, wire: Any, raw: bytes, turns: List[Turn], tools: Dict[str, Any]) -> None:
        check_request(wire, raw, turns, tools)

    def play(self, wire: Any, turns: List[Turn], tools: Dict[str, Any]) -> List[Any]:
        """The script's next lines; none: the prompt is too long."""
        if "create a detailed summary" in turns[-1].text:
            self.seen.append((wire, "summary", turns))
            return [("text", f"<summary>{SUMMARY}</summary>")]
        place, task = [(place, word) for place, turn in enumerate(turns) if turn.role == "user"
                       for word in re.findall(r"PLAY-(\w+)", turn.text)][-1]
        after = turns[place + 1:]
        steps = [turn for turn in after if turn.role == "assistant"]
        self.seen.append((wire, task, turns))
        thoughts = [turn.thoughts for turn in steps]
        expect(all(thoughts), "the thinking of this turn is back", thoughts)
        if task == "overflow" and not any(SUMMARY in turn.text for turn in turns):
            return []
        results = [text for turn in after for text in turn.results.values()]
        images = [image for turn in after for image in turn.images]
        lines = self.script(task, results, images)[len(steps)]
        missing = {value[0] for kind, value in lines if kind == "call"} - set(tools)
        expect(not missing, "the tools are offered", (missing, list(tools)))
        return [("think", f"pondering {task} {len(steps)}"), *lines]

    def script(self, task: str, results: List[str], images: List[bytes]) -> List[Any]:
        def read(name: str) -> Any:
            return "call", ("Read", {"file_path": self.path(name)})
        hello, last = {"file_path": self.path("hello.py")}, (results or [""])[-1]
        errand = {"description": "An errand", "prompt": "PLAY-errand", "subagent_type": "general-purpose",
                  "run_in_background": False}
        scripts: Dict[str, List[Any]] = {
            "files": [[("text", "Well."), ("call", ("Write", {**hello, "content": PROGRAM.replace("world", "wrold")}))],
                      [read("hello.py")], [("call", ("Edit", {**hello, "old_string": "wrold", "new_string": "world"}))],
                      [("call", ("Bash", {"command": f"{sys.executable} hello.py", "description": "Run it"}))],
                      [read("hello.py"), read("other.txt")], [("text", f"{results[3:4]} {sorted(results[4:])}")]],
            "wait": [[("call", ("Bash", {"command": "touch running; sleep 90", "description": "Wait"}))]],
            "image": [[read("red.png")], [("text", f"as it was: {images == [PNG]}")]],
            "agent": [[("call", ("Agent", errand))], [("text", f"told: {last}")]],
            "errand": [[read("other.txt")], [("text", "it says " + "".join(re.findall(r"m4rk3r-\d", last)))]],
            "endless": [[("text", "endless")]]}
        return scripts.get(task, [[("text", f"done {task}")]])

    def command(self, *options: str) -> List[str]:
        tools = "Read,Write,Edit,Bash,Agent"
        return [self.claude, "--permission-mode", "acceptEdits", "--allowedTools", tools, *options]

    def ask(self, *prompts: str, more: Tuple[str, ...] = ()) -> List[Dict[str, Any]]:
        """Claude Code's records of a session with these prompts; the last is a result."""
        options = ("-p", "--input-format", "stream-json", "--output-format", "stream-json", "--verbose", *more)
        turns = [{"type": "user", "message": {"role": "user", "content": text}} for text in prompts]
        records: List[Dict[str, Any]] = []
        with subprocess.Popen(self.command(*options), env=self.environ, cwd=self.work, bufsize=1, encoding="utf-8",
                              stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as process:
            timer = threading.Timer(PATIENCE_S, process.kill)
            timer.start()
            process.stdin.write(json.dumps(turns.pop(0)) + "\n")
            for line in process.stdout:
                records.append(json.loads(line))
                if records[-1]["type"] == "result":
                    process.stdin.write(json.dumps(turns.pop(0)) + "\n") if turns else process.stdin.close()
            timer.cancel()
        expect(not self.faults, "the provider refuses nothing", self.faults[:1])
        failed = [record.get("result") for record in records if record["type"] == "result" and record["is_error"]]
        expect(records and records[-1]["type"] == "result" and not failed, "it ends well", failed or records)
        return records

    def close(self) -> None:
        end_process(self.gateway)
        self.server.shutdown()
        self.server.server_close()


def end_process(process: "subprocess.Popen[Any]") -> None:
    process.terminate()
    try:
        process.wait(10)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def test_files(place: Place, wire: Any) -> None:
    """It writes, reads, edits and runs a file, and reads two at once; the thinking is shown."""
    records = place.ask("PLAY-files please")
    told = records[-1]["result"]
    expect("hello world" in told and "naïve – “ü”" in told and "m4rk3r-7" in told, "all results", told)
    with open(place.path("hello.py"), encoding="utf-8") as file:
        expect(file.read() == PROGRAM, "the program that was wanted")
    thoughts = [block["thinking"] for record in records if record["type"] == "assistant"
                for block in record["message"]["content"] if block["type"] == "thinking"]
    expect(thoughts == [f"pondering files {step}" for step in range(6)], "the thinking is shown", thoughts)


def test_image(place: Place, wire: Any) -> None:
    """An image that a tool reads reaches the provider."""
    told = place.ask("PLAY-image please")[-1]["result"]
    expect(told == "as it was: True", "the image as it was", told)


def test_agent(place: Place, wire: Any) -> None:
    """A sub-agent calls tools of its own, and its answer returns to the main loop."""
    told = place.ask("PLAY-agent please")[-1]["result"]
    expect("it says m4rk3r-7" in told, "what the sub-agent said", told)


def test_compaction(place: Place, wire: Any) -> None:
    """A prompt that is too long, in the provider's words: the conversation is compacted and goes on."""
    words = ("first", "second", "overflow", "third")
    records = place.ask(*(f"PLAY-{word}" for word in words))
    told = [record["result"] for record in records if record["type"] == "result"]
    expect(told == [f"done {word}" for word in words], "all answers", told)
    kinds = [record.get("subtype") for record in records]
    expect(kinds.count("compact_boundary") == 1, "one compaction", kinds)


class Terminal:
    """Claude Code on a terminal, ready to be typed at."""

    def __init__(self, place: Place) -> None:
        import pty
        self.main, side = pty.openpty()
        self.screen: List[bytes] = []
        self.process = subprocess.Popen(place.command(), env={**place.environ, "COLUMNS": "140", "LINES": "40"},
                                        cwd=place.work, stdin=side, stdout=side, stderr=side, start_new_session=True)
        os.close(side)
        threading.Thread(target=self.watch, daemon=True).start()

    def __enter__(self) -> "Terminal":
        self.see("accept")
        time.sleep(1)
        return self

    def __exit__(self, *_: Any) -> None:
        end_process(self.process)
        os.close(self.main)

    def watch(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                self.screen.append(os.read(self.main, 65536))

    def see(self, word: str) -> None:
        wait_for(f"{word!r} on the screen", lambda: word.encode() in b"".join(self.screen), lambda: self.screen)
        self.screen.clear()

    def tell(self, line: str) -> None:
        self.press(line.encode())
        time.sleep(0.5)                         # else Enter would be part of a paste
        self.press(b"\r")

    def press(self, keys: bytes) -> None:
        os.write(self.main, keys)


def test_interruption(place: Place, wire: Any) -> None:
    """Ctrl-C in the middle of an answer ends the provider's connection, and the session goes on."""
    with Terminal(place) as terminal:
        terminal.tell("PLAY-endless please")
        terminal.see("drop")
        before = time.monotonic()
        terminal.press(b"\x03")
        wait_for("end of the connection", lambda: place.cuts)
        expect(place.cuts[0] - before < 1, "it ends within a second", place.cuts[0] - before)
        terminal.see("nterrupted")
        terminal.tell("PLAY-next please")
        wait_for("next request", lambda: place.seen[-1][1] == "next", lambda: place.faults or terminal.screen)
        terminal.see("done")
    expect(not place.faults, "the provider refuses nothing", place.faults[:1])
    said = "".join(turn.text for turn in place.seen[-1][2] if turn.role == "assistant")
    expect("drop" in said, "what was said stays", said)


def test_interrupted_tool(place: Place, wire: Any) -> None:
    """Ctrl-C while a tool runs: its call gets a result that says so, and the session goes on."""
    with Terminal(place) as terminal:
        terminal.tell("PLAY-wait please")
        wait_for("tool that runs", lambda: os.path.exists(place.path("running")), lambda: place.faults or terminal.screen)
        terminal.press(b"\x03")
        terminal.see("nterrupted")
        terminal.tell("PLAY-next please")
        wait_for("next request", lambda: place.seen[-1][1] == "next", lambda: place.faults or terminal.screen)
        terminal.see("done")
    expect(not place.faults, "the provider refuses nothing", place.faults[:1])
    turns = place.seen[-1][2]
    expect(["Bash"] in [list(turn.calls.values()) for turn in turns], "the call stays", turns)
    results = [text for turn in turns for text in turn.results.values()]
    expect(len(results) == 1 and results[0], "and has its result", results)


def test_compact(place: Place, wire: Any) -> None:
    """/compact has the conversation summed up, and the session goes on with the summary; what it keeps of the last turn
    begins with one that has no text but sets the effort."""
    with Terminal(place) as terminal:
        for line, task, sign in (("PLAY-files", "files", "m4rk3r"), ("/compact", "summary", "ompacted"),
                                 ("PLAY-second", "second", "done")):
            terminal.tell(line)
            wait_for(f"request: {task}", lambda: [seen[1] for seen in place.seen[-1:]] == [task],
                     lambda: place.faults or terminal.screen)
            terminal.see(sign)
    expect(not place.faults, "the provider refuses nothing", place.faults[:1])
    turns = place.seen[-1][2]
    expect(any(SUMMARY in turn.text for turn in turns), "the summary is sent", [turn.text for turn in turns])
    expect(not any(turn.calls for turn in turns), "and not what it sums up", [turn.calls for turn in turns])


def test_change(place: Place, wire: Any) -> None:
    """Another provider behind the same name never sees the first one's thinking; the first gets it again."""
    place.ask("PLAY-files please")
    for other in (WIRES[(WIRES.index(wire) + 1) % len(WIRES)], wire):
        place.use(other)
        time.sleep(2.5)                         # until the file is read again
        expect(place.ask(f"PLAY-{other.name}", more=("--continue",))[-1]["result"] == f"done {other.name}", "an answer")
        expect(place.seen[-1][0] is other, "this provider was asked", place.seen[-1][0].name)
    expect(sum(bool(turn.thoughts) for turn in place.seen[-1][2]) >= 5, "its thinking is back", place.seen[-1][2])


TESTS = [test_files, test_image, test_agent, test_compaction, test_interruption, test_interrupted_tool, test_compact,
         test_change]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pigateway")
    parser.add_argument("--claude", default="claude")
    parser.add_argument("--only", nargs="*", default=[], metavar="WORD", help="a test, a provider, or one of each")
    arguments = parser.parse_args()
    claude = shutil.which(arguments.claude)
    if not claude or os.name != "posix":
        print("skipped: no Claude Code on PATH")
        return 77
    chosen = [(test, wire) for test in TESTS for wire in WIRES if set(arguments.only) <= {test.__name__[5:], wire.name}]
    def run(test: Callable[..., None], wire: Any, home: str) -> None:
        with contextlib.closing(Place(os.path.abspath(arguments.pigateway), os.path.abspath(claude), home, wire)) as place:
            test(place, wire)

    return run_tests([(f"{test.__name__[5:]}, {wire.name}", functools.partial(run, test, wire)) for test, wire in chosen])


def run_tests(tests: Sequence[Tuple[str, Callable[[str], None]]]) -> int:
    """Runs tests by name, each in a home folder of its own, and tells how they went; 1 if one failed."""
    failed = 0
    for name, test in tests:
        began = time.monotonic()
        with tempfile.TemporaryDirectory() as home:
            try:
                test(os.path.realpath(home))
                print(f"ok      {name} ({time.monotonic() - began:.1f} s)", flush=True)
            except Exception as error:
                failed += 1
                print(f"FAILED  {name}: {type(error).__name__}: {error}", flush=True)
    print(f"{len(tests) - failed} of {len(tests)} passed")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
