#!/usr/bin/env python3
"""Tests pigateway with the real Codex CLI and the real Gemini CLI, offline, on scripted providers of four protocols.

    python .ci/cli_clients.py PIGATEWAY [--only WORD ...]

PIGATEWAY is the path of pigateway.py; `codex`, `gemini` and `node` are looked for on PATH. Exit status: 0 all is well,
1 something is not, 77 skipped: a client is missing, or the package jsonschema. The clients are configured as the README
says, and by the launchers. The providers refuse what their vendors would (see claude_code_providers.py) and count what
they are asked; clients and gateway may say nothing of retries, fallbacks or broken streams.
"""
from __future__ import annotations

import argparse
import contextlib
import functools
import http.server
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
from typing import Any, Callable, Dict, Iterator, List, Sequence

from claude_code import PATIENCE_S, PNG, Place, end_process, run_tests
from claude_code_providers import WIRES, Turn, expect

MCP_SERVER = """
import json, sys
for line in sys.stdin:
    asked = json.loads(line)
    answer = {"initialize": {"protocolVersion": "2025-06-18", "capabilities": {"tools": {}},
                             "serverInfo": {"name": "library", "version": "1"}},
              "tools/list": {"tools": [{"name": "lend_book", "description": "Lends a book of the library",
                  "inputSchema": {"type": "object", "properties": {"title": {"type": "string"}}}}]},
              "tools/call": {"content": [{"type": "text", "text": "lent: " + json.dumps(asked.get("params"))}]}}
    if "id" in asked:
        print(json.dumps({"jsonrpc": "2.0", "id": asked["id"], "result": answer.get(asked["method"], {})}), flush=True)
"""
SUMMARY = "They had come as far as step two."
HELLO = "print('hello wrold')\n# naïve – “ü”\n"
PROGRAM = HELLO.replace("wrold", "world")
PATCH = ("*** Begin Patch\n*** Update File: hello.py\n@@\n-print('hello wrold')\n+print('hello world')\n"
         " # naïve – “ü”\n*** Add File: sub/new.txt\n+“new” \\n \"line\"\n*** End Patch\n")
SCHEMA = {"type": "object", "properties": {"seen": {"type": "boolean"}}, "required": ["seen"],
          "additionalProperties": False}
ASKED_SCHEMA: Dict[str, Callable[[Dict[str, Any]], Any]] = {
    "chat": lambda body: body["response_format"]["json_schema"]["schema"],
    "responses": lambda body: body["text"]["format"]["schema"],
    "gemini": lambda body: body["generationConfig"]["responseJsonSchema"],
    "anthropic": lambda body: body["output_config"]["format"]["schema"]}
SCHEMA_FILES = {"chat": "openai-chat-request", "responses": "openai-responses-request", "gemini": "gemini-request",
                "anthropic": "anthropic-messages-request"}
# What a log has when something went wrong; Codex also tells of retries that were not.
TROUBLE = re.compile(r"(?i)retry(?!_count=0|_after_unauthorized=false)|retries|reconnect|stream (error|closed|disc)|"
                     r"malformed|unhandled|unexpected|fall(ing|s)? ?back|failed to|invalid|\bWARN\b|\bERROR\b")
# What these clients say when nothing did.
HARMLESS = re.compile(r"^(\[(MESSAGE_BUS|Conseca|ContextBuilder|PolicyEngine\.check)\]|Ripgrep is not available)|"
                      r"failed to flush rollout after emitting terminal turn event|"
                      r'"method": "HEAD", "url": "/v1/responses", "status": 405')


class Stage(Place):
    """A `Place` whose client is Codex or Gemini CLI, in a git repository. `bodies` is what the provider was sent."""

    def __init__(self, pigateway: str, home: str, wire: Any) -> None:
        super().__init__(pigateway, "", home, wire)
        self.pigateway, self.wire, self.bodies = pigateway, wire, []
        self.said_before = 0                    # thoughts of the provider before the turn that is under way
        self.url = self.environ["ANTHROPIC_BASE_URL"]
        # a home below TMPDIR would be a temporary one to Codex, which then says so
        self.client_environ = {
            "HOME": home, "TMPDIR": os.path.join(home, "tmp"), "NO_PROXY": "*", "no_proxy": "*",
            "PATH": os.environ["PATH"], "LANG": os.environ.get("LANG", "C.UTF-8"), "TERM": "xterm-256color",
            "RUST_LOG": "info,codex_api=debug,codex_client=debug,feedback_tags=off,codex_core_plugins=off",
            "GEMINI_CLI_TRUST_WORKSPACE": "true"}
        os.mkdir(self.client_environ["TMPDIR"])
        self.variables = self.settings()
        subprocess.run(["git", "init", "-q", self.work], check=True)
        with open(self.path("hello.py"), "w", encoding="utf-8") as file:
            file.write(HELLO)

    def settings(self) -> Dict[str, str]:
        """Configures the client as the README says; returns further variables."""
        raise NotImplementedError

    def serve(self, handler: http.server.BaseHTTPRequestHandler) -> None:
        if not handler.path.endswith(":countTokens"):
            return super().serve(handler)
        raw = handler.rfile.read(int(handler.headers["content-length"]))
        if set(json.loads(raw)) != {"contents"}:
            self.faults.append(f"countTokens of {raw[:300]!r}")
        handler.send_response(200)
        handler.send_header("content-type", "application/json")
        handler.end_headers()
        handler.wfile.write(b'{"totalTokens": 90}')

    def check(self, wire: Any, raw: bytes, turns: List[Turn], tools: Dict[str, Any]) -> None:
        super().check(wire, raw, turns, tools)
        body = json.loads(raw)
        self.bodies.append(body)
        flaws = [f"{error.json_path}: {error.message}" for error in VALIDATORS[wire.name].iter_errors(body)]
        expect(not flaws, "a body that fits the schema", flaws[:3])
        foreign = set(names(body)) - WORDS[wire.name]
        expect(not foreign, "only names of this protocol", sorted(foreign))

    def play(self, wire: Any, turns: List[Turn], tools: Dict[str, Any]) -> List[Any]:
        if "CONTEXT CHECKPOINT COMPACTION" in turns[-1].text:
            return [("text", SUMMARY)]
        place, task = [(place, word) for place, turn in enumerate(turns) if turn.role == "user"
                       for word in re.findall(r"PLAY-(\w+)", turn.text)][-1]
        self.seen.append((wire, task, turns))
        after = turns[place + 1:]
        thoughts = [thought for turn in after for thought in turn.thoughts]
        steps = [turn for turn in after if turn.role == "assistant"]
        self.said_before = self.said_before if steps else len(wire.thoughts)
        said = wire.thoughts[self.said_before:]
        expect(thoughts == said, "the thinking of this turn is back as it was", (thoughts, said))
        results = [text for turn in after for text in turn.results.values()]
        pictures = [image for turn in turns for image in turn.images]
        lines = self.script(task, results, pictures)[len(steps)]
        missing = {value[0] for kind, value in lines if kind in ("call", "custom")} - set(tools)
        expect(not missing, "the tools are offered", (missing, list(tools)))
        if wire.name != "responses":            # has no free text as a call's arguments
            lines = [("call", (value[0], {"input": value[1]})) if kind == "custom" else (kind, value)
                     for kind, value in lines]
        if wire.name in ("responses", "anthropic"):         # those that think between two calls, too
            calls = [place for place, (kind, _) in enumerate(lines) if kind == "call"]
            for place in calls[1:]:
                lines.insert(place, ("think", f"and also {len(steps)}"))
        return [("think", f"pondering {task} {len(steps)}"), *lines]

    def run(self, command: List[str], requests: int, launched: bool = False, statuses: Sequence[int] = (200,)) -> str:
        """The output of a client that asks the provider so often. A launched one has the launcher's variables alone."""
        before = len(self.bodies)
        if launched:
            command = [sys.executable, self.pigateway, "--port", "0", *command]
        environ = {**self.client_environ, **({} if launched else self.variables)}
        with subprocess.Popen(command, env=environ, cwd=self.work, stdin=subprocess.DEVNULL, start_new_session=True,
                              encoding="utf-8", stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
            timer = threading.Timer(PATIENCE_S, os.killpg, (process.pid, signal.SIGKILL))
            timer.start()
            output, errors = process.communicate()
            timer.cancel()
        expect(not self.faults, "the provider refuses nothing", self.faults[:1])
        expect(process.returncode == 0, "exit status 0", (process.returncode, output[-900:], errors[-900:]))
        log = ""
        for name in ("log", ".pi/agent/gateway.log"):
            with contextlib.suppress(FileNotFoundError), open(os.path.join(self.home, name), encoding="utf-8") as file:
                log += file.read()
        found = [(TROUBLE.search(line), line) for line in [*errors.splitlines(), *log.splitlines()]]
        lines = [f"{line[max(0, word.start() - 60):word.end() + 60]} ... {line[-200:]}"
                 for word, line in found if word and not HARMLESS.search(line)]
        expect(not lines, "no word of trouble", lines[:3])
        records = [json.loads(line) for line in log.splitlines() if line.startswith("{")]
        bad = [record for record in records if record["level"] != "info" or record.get("status", 200) not in statuses]
        expect(not bad, "a gateway that logs no failure", bad)
        expect(len(self.bodies) - before == requests, f"{requests} requests", len(self.bodies) - before)
        return output

    def has_program(self) -> None:
        with open(self.path("hello.py"), encoding="utf-8") as file:
            expect(file.read() == PROGRAM, "the program that was wanted")


def names(value: Any) -> Iterator[str]:
    """All names of fields, but for those in schemas and arguments."""
    for key, inner in value.items() if isinstance(value, dict) else ():
        yield key
        if key not in ("parameters", "parametersJsonSchema", "input_schema", "schema", "responseJsonSchema", "args",
                       "arguments", "client_metadata", "response") and (key != "input" or isinstance(inner, list)):
            yield from names(inner)
    for inner in value if isinstance(value, list) else ():
        yield from names(inner)


# All that a request of each protocol may have; "args" and the like are not looked into.
WORDS = {name: set(words.split()) for name, words in {
    "chat": """model messages role content text type image_url url detail tool_calls id function name arguments
        tool_call_id reasoning_content tools description parameters strict tool_choice parallel_tool_calls stream
        stream_options include_usage max_tokens max_completion_tokens temperature top_p reasoning_effort verbosity
        response_format json_schema schema prompt_cache_key user""",
    "responses": """model input type id role content text image_url detail status phase summary encrypted_content
        call_id name namespace arguments execution output annotations logprobs tools description parameters strict format syntax
        definition defer_loading external_web_access search_content_types tool_choice parallel_tool_calls reasoning
        effort context stream store include prompt_cache_key verbosity schema client_metadata max_output_tokens
        temperature top_p""",
    "gemini": """contents role parts text thought thoughtSignature functionCall functionResponse id name args response
        inlineData mimeType data systemInstruction tools functionDeclarations description parametersJsonSchema
        toolConfig functionCallingConfig mode generationConfig responseMimeType responseJsonSchema thinkingConfig
        includeThoughts thinkingLevel temperature topP topK maxOutputTokens""",
    "anthropic": """model max_tokens messages role content type text source media_type data thinking signature id name
        input tool_use_id is_error cache_control system tools description input_schema tool_choice budget_tokens
        disable_parallel_tool_use output_config format schema effort stream temperature top_p top_k"""}.items()}


class Codex(Stage):
    name = "codex"

    def settings(self) -> Dict[str, str]:
        os.mkdir(os.path.join(self.home, ".codex"))
        with open(os.path.join(self.home, ".codex", "config.toml"), "w", encoding="utf-8") as file:
            file.write('model = "gpt-5.5"\nmodel_provider = "pigateway"\n\n[model_providers.pigateway]\n'
                       f'name = "pigateway"\nbase_url = "{self.url}/v1"\n'
                       'env_key = "PIGATEWAY_KEY"\nwire_api = "responses"\n')
        return {"PIGATEWAY_KEY": "anything"}

    def ask(self, words: List[str], requests: int, launched: bool = False) -> str:
        """What Codex said last."""
        told = os.path.join(self.home, "told")
        output = self.run(["codex", "exec", "--json", "-o", told, "--dangerously-bypass-approvals-and-sandbox", *words],
                          requests, launched)
        records = [json.loads(line) for line in output.splitlines()]
        kinds = [record["type"] for record in records] + [
            record["item"]["type"] for record in records if "item" in record]
        is_whole = kinds.count("turn.completed") == 1 and not {"error", "turn.failed"} & set(kinds)
        expect(is_whole, "a whole turn", records)
        self.records = records
        with open(told, encoding="utf-8") as file:
            return file.read()

    def script(self, task: str, results: List[str], pictures: List[bytes]) -> List[Any]:
        def run(command: str) -> Any:
            return "call", ("exec_command", {"cmd": command})

        def code(text: str) -> Any:
            return "custom", ("functions__exec", text)
        found = re.findall(r"mcp__\w+", " ".join(results)) or [""]
        scripts = {
            "files": [[("text", "Well."), run("cat hello.py"), run("cat other.txt")],
                      [("custom", ("apply_patch", PATCH))], [run("echo whoops; exit 3")],
                      [run(f"{sys.executable} hello.py")], [("text", json.dumps(results))]],
            "picture": [[("call", ("view_image", {"path": self.path("red.png")}))],
                        [("text", json.dumps({"seen": pictures == [PNG, PNG]}))]],
            "code": [[code("const [a, b] = await Promise.all([tools.exec_command({cmd: 'cat hello.py'}), "
                           "tools.exec_command({cmd: 'cat other.txt'})]); text(a.output); text(b.output)")],
                     [code(f"text(await tools.apply_patch({json.dumps(PATCH)}))")],
                     [code("notify('halfway'); text(await tools.exec_command({cmd: 'echo whoops; exit 3'}))")],
                     [code(f"text(await tools.exec_command({{cmd: '{sys.executable} hello.py'}}))")],
                     [("text", json.dumps(results))]],
            "search": [[("call", ("tool_search", {"query": "lend a book"}))],
                       [("call", (found[0], {"title": "Emma"}))], [("text", json.dumps(results))]],
            "long": [[("tokens", 90000), run("cat other.txt")], [("text", "too far")]]}
        if any(SUMMARY in turn.text for turn in self.seen[-1][2]):
            return [[("text", "on we go")]]
        return scripts.get(task, [[("text", f"done {task}")]])

    def test_files(self) -> None:
        """It reads two files at once, patches one, adds one, has a command fail, runs one; and goes on from there."""
        results = json.loads(self.ask(["PLAY-files please"], 5))
        wanted = [HELLO, "m4rk3r-7", "Success", "whoops", "hello world"]
        expect(len(results) == 5 and all(want in text for want, text in zip(wanted, results)), "all results", results)
        expect("exited with code 3" in results[3] and "exited with code 0" in results[4], "statuses", results[3:])
        self.has_program()
        with open(self.path("sub/new.txt"), encoding="utf-8") as file:
            expect(file.read() == "“new” \\n \"line\"\n", "the file that was wanted")
        items = [record["item"] for record in self.records if "item" in record]
        thoughts = " ".join(item["text"] for item in items if item["type"] == "reasoning")
        expect(re.findall(r"pondering files \d", thoughts) == [f"pondering files {step}" for step in range(5)],
               "the thinking is shown", thoughts)
        told = self.ask(["resume", "--last", "PLAY-more please"], 1, launched=True)
        expect(told == "done more", "the session goes on", told)

    def test_picture(self) -> None:
        """An image of the user's, one that a tool shows, and an answer by a schema."""
        schema = os.path.join(self.home, "schema.json")
        self.write("schema.json", SCHEMA)
        told = self.ask(["-i", self.path("red.png"), "--output-schema", schema, "--", "PLAY-picture please"], 2)
        expect(json.loads(told) == {"seen": True}, "both images as they were", told)
        asked = [ASKED_SCHEMA[self.wire.name](body) for body in self.bodies]
        expect(asked == [SCHEMA, SCHEMA], "the schema", asked)

    def test_code(self) -> None:
        """With no model named: its own choice, which writes programs that call the tools."""
        os.unlink(os.path.join(self.home, ".codex", "config.toml"))
        results = json.loads(self.ask(["PLAY-code please"], 5, launched=True))
        wanted = [("hello wrold", "m4rk3r-7"), ("{}",), ("halfway", "whoops", '"exit_code":3'), ("hello world",)]
        expect(len(results) == 4 and all(word in text for words, text in zip(wanted, results) for word in words),
               "all results", results)
        self.has_program()

    def test_search(self) -> None:
        """It finds tools that it was not offered at first, as all of MCP servers' are, and calls one."""
        server = ["-c", f"mcp_servers.library.command={json.dumps(sys.executable)}", "-c",
                  f"mcp_servers.library.args={json.dumps(['-c', MCP_SERVER])}"]
        results = json.loads(self.ask([*server, "PLAY-search please"], 3))
        expect("mcp__library__lend_book" in results[0] and "lent" in results[1] and "Emma" in results[1], "a loan",
               results)

    def test_doctor(self) -> None:
        """Its own look at the provider and its models."""
        report = json.loads(self.run(["codex", "doctor", "--json"], 0, statuses=(200, 405)))
        told = report["checks"]["network.provider_reachability"]
        expect(told["status"] == "ok" and "(HTTP 200)" in str(told["details"]), "a list of models", told)

    def test_compaction(self) -> None:
        """A conversation that grows too long is summarised with an ordinary request, and goes on."""
        told = self.ask(["-c", "model_auto_compact_token_limit=50000", "PLAY-long please"], 3)
        expect(told == "on we go", "it goes on", told)


class Gemini(Stage):
    name = "gemini cli"

    def settings(self) -> Dict[str, str]:
        os.mkdir(os.path.join(self.home, ".gemini"))
        self.choose("gemini-api-key")
        return {"GOOGLE_GEMINI_BASE_URL": self.url, "GEMINI_API_KEY": "anything"}

    def choose(self, login: str) -> None:
        # it cannot tell Google how it is used, and says so
        self.write(".gemini/settings.json", {"security": {"auth": {"selectedType": login}},
                                             "privacy": {"usageStatisticsEnabled": False}})

    def ask(self, words: List[str], requests: int, launched: bool = False) -> str:
        """What Gemini CLI said."""
        output = self.run(["gemini", "-d", "--model", "some-model", "--approval-mode", "yolo", "-o", "stream-json",
                           *words], requests, launched)
        records = [json.loads(line) for line in output.splitlines()]
        expect([record["type"] for record in records[::len(records) - 1]] == ["init", "result"], "its records", records)
        expect(records[-1]["status"] == "success" and "error" not in {record["type"] for record in records}, "success",
               records)
        self.records = records
        return "".join(record["content"] for record in records if record.get("role") == "assistant")

    def script(self, task: str, results: List[str], pictures: List[bytes]) -> List[Any]:
        def call(name: str, **arguments: Any) -> Any:
            return "call", (name, arguments)
        hello = self.path("hello.py")
        scripts = {
            "files": [[("text", "Well."), call("read_file", file_path=hello),
                       call("read_file", file_path=self.path("other.txt"))],
                      [call("replace", file_path=hello, instruction="Mend it", old_string="wrold", new_string="world")],
                      [call("write_file", file_path=self.path("new.txt"), content=PROGRAM)],
                      [call("run_shell_command", command="echo whoops; exit 3")],
                      [call("run_shell_command", command=f"{sys.executable} hello.py")],
                      [("text", json.dumps(results))]],
            "picture": [[call("read_file", file_path=self.path("red.png"))],
                        [("text", json.dumps({"seen": pictures == [PNG, PNG]}))]]}
        return scripts.get(task, [[("text", f"done {task}")]])

    def test_files(self) -> None:
        """It reads two files at once, edits one, writes one, has a command fail, runs one; and goes on from there."""
        results = json.loads(self.ask(["-p", "PLAY-files please"], 6).partition("Well.")[2])
        wanted = [HELLO, "m4rk3r-7", "Success", "Success", "Exit Code: 3", "hello world"]
        expect(len(results) == 6 and all(want in text for want, text in zip(wanted, results)), "all results", results)
        self.has_program()
        with open(self.path("new.txt"), encoding="utf-8") as file:
            expect(file.read() == PROGRAM, "the file that was wanted")
        kinds = [record["type"] for record in self.records]
        expect(kinds.count("tool_use") == kinds.count("tool_result") == 6, "calls and their results are shown", kinds)
        self.choose("oauth-personal")
        end_process(self.gateway)               # the launcher starts its own
        told = self.ask(["--resume", "latest", "-p", "PLAY-more please"], 1, launched=True)
        expect(told == "done more", "the session goes on", told)

    def test_picture(self) -> None:
        """An image of the user's, and one that a tool reads."""
        told = self.ask(["-p", "PLAY-picture @red.png"], 2)
        expect(json.loads(told) == {"seen": True}, "both images as they were", told)


VALIDATORS: Dict[str, Any] = {}
TESTS = [(client, name, wire) for client in (Codex, Gemini) for name in vars(client) if name.startswith("test_")
         for wire in WIRES if name != "test_doctor" or wire is WIRES[0]]          # which asks no provider


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pigateway")
    parser.add_argument("--only", nargs="*", default=[], metavar="WORD", help="a client, a test, a provider")
    arguments = parser.parse_args()
    try:
        import jsonschema
    except ImportError:
        print("skipped: no jsonschema")
        return 77
    if not all(map(shutil.which, ("codex", "gemini", "node", "git"))) or os.name != "posix":
        print("skipped: codex, gemini, node or git is not on PATH")
        return 77
    pigateway = os.path.abspath(arguments.pigateway)
    for name, file in SCHEMA_FILES.items():
        with open(os.path.join(os.path.dirname(pigateway), "schemas", file + ".json"), encoding="utf-8") as text:
            VALIDATORS[name] = jsonschema.Draft202012Validator(json.load(text))
    chosen = [(client, test, wire, f"{client.name}, {test[5:]}, {wire.name}") for client, test, wire in TESTS]
    chosen = [row for row in chosen if set(arguments.only) <= set(row[-1].split(", "))]

    def run(client: Callable[..., Any], test: str, wire: Any, home: str) -> None:
        with contextlib.closing(client(pigateway, home, wire)) as stage:
            getattr(stage, test)()

    return run_tests([(name, functools.partial(run, *row)) for *row, name in chosen])


if __name__ == "__main__":
    sys.exit(main())
