"""What the tests of shared log-ins have in common: gateway processes, the auth.json they share, a foreign user of that
file who keeps to the lock protocol, pi itself, and clients."""
import contextlib
import ctypes
import http.client
import json
import os
import re
import shutil
import signal
import socket
import stat
import subprocess
import sys
import tempfile
import threading
import time
from typing import Any, Callable, Dict, Iterator, List, NamedTuple, Optional, Sequence, Tuple

from authserver import GROQ_KEY, JWT_HEAD, MARK, World, make_certificates

LIBC = ctypes.CDLL(None)
HERE = os.path.dirname(os.path.abspath(__file__))
LEAK = re.compile("|".join(map(re.escape, (MARK, JWT_HEAD, "sk-ant-oat01", "sk-ant-ort01"))))
MODELS = {"anthropic": "anthropic/claude-sonnet-4-5", "openai-codex": "openai-codex/gpt-5.6-luna",
          "groq": "groq/llama-3.3-70b-versatile"}
# entries of all kinds, in the form that pi writes; nothing may touch them
OTHERS: Dict[str, Any] = {
    "groq": {"type": "api_key", "key": GROQ_KEY},
    "cloudflare-ai-gateway": {"type": "api_key", "key": "cf-key", "env": {
        "CLOUDFLARE_ACCOUNT_ID": "acc", "CLOUDFLARE_GATEWAY_ID": "gw"}},
    "amazon-bedrock": {"type": "api_key", "env": {"AWS_PROFILE": "nobody"}},
    "openrouter": {"type": "oauth", "access": "sk-or-v1-rig", "refresh": "", "expires": 9007199254740991},
    "radius": {"type": "oauth", "access": "ra", "refresh": "rr", "expires": 9007199254740991, "scope": "gateway",
               "gatewayConfig": {"baseUrl": "http://127.0.0.1:9/v1", "models": []}},
    "some-tool": {"type": "api_key", "key": "$SOME_TOOL_KEY", "comment": "\u6f22\u5b57 \U0001f469\u200d\U0001f4bb "
                  "\u2028 \u007f \u0001\b\f\t \"quoted\" \\ /",
                  "nested": {"a": [1, 2.5, -0.001, None, True, {}], "b": []}, "big": 9007199254740991, "": ""},
    "other-tool": {"type": "api_key", "key": "!echo key", "enabled": False},
}


class Failed(Exception):
    """A promise that was not kept."""


def expect(condition: Any, message: str) -> None:
    if not condition:
        raise Failed(message)


# --- auth.json --------------------------------------------------------------------------------------------------------


def dump(data: Dict[str, Any]) -> str:
    """JSON as pi writes it."""
    return json.dumps(data, indent=2, ensure_ascii=False)


def slices(text: str) -> Dict[str, str]:
    """The text of each entry of a JSON object."""
    decoder, found = json.JSONDecoder(), {}
    blank = re.compile(r"[\s,:]*")
    position = text.index("{") + 1
    while True:
        position = blank.match(text, position).end()
        if text[position] == "}":
            return found
        key, position = decoder.raw_decode(text, position)
        position = blank.match(text, position).end()
        _, end = decoder.raw_decode(text, position)
        found[key] = text[position:end]
        position = end


def write_atomic(path: str, text: str) -> None:
    """As careful tools write."""
    path = os.path.realpath(path)
    temporary = f"{path}.rig{os.getpid()}-{threading.get_ident()}"
    with open(os.open(temporary, os.O_CREAT | os.O_WRONLY | os.O_TRUNC, 0o600), "w", encoding="utf-8") as file:
        file.write(text)
    os.replace(temporary, path)


def write_in_place(path: str, text: str) -> None:
    """As pi writes."""
    with open(path, "w", encoding="utf-8") as file:
        file.write(text)


def load(path: str) -> Dict[str, Any]:
    """What is in the file, read as patiently as it takes."""
    for _ in range(100):
        with contextlib.suppress(OSError, ValueError):
            with open(path, encoding="utf-8-sig") as file:
                return json.loads(file.read())
        time.sleep(0.01)
    raise Failed(f"{os.path.basename(path)} is not readable JSON")


def mode_of(path: str) -> str:
    return oct(stat.S_IMODE(os.stat(path).st_mode))


class ForeignLock:
    """Another tool that takes the lock as pi does."""

    def __init__(self, path: str) -> None:
        self.folder = os.path.abspath(path) + ".lock"

    def acquire(self, patience_s: float = 60.0) -> float:
        """Takes it and returns how long that took."""
        started, pause = time.monotonic(), 0.01
        while True:
            try:
                os.mkdir(self.folder)
                return time.monotonic() - started
            except FileExistsError:
                if time.monotonic() - started > patience_s:
                    raise Failed("the lock was not free in time") from None
            time.sleep(pause)
            pause = min(pause * 1.5, 0.25)

    def release(self) -> None:
        os.rmdir(self.folder)

    def __enter__(self) -> "ForeignLock":
        self.acquire()
        return self

    def __exit__(self, *_: Any) -> None:
        self.release()


def age(path: str, seconds: float) -> None:
    """Makes a lock directory look as if its owner had last touched it so long ago."""
    then = time.time() - seconds
    os.utime(path, (then, then))


# --- Processes --------------------------------------------------------------------------------------------------------


def give_up_rights() -> None:
    """From its next exec on this process is bound by file modes, even as root (Linux: PR_CAPBSET_DROP)."""
    if os.geteuid() == 0:
        for capability in (1, 2):               # CAP_DAC_OVERRIDE, CAP_DAC_READ_SEARCH
            LIBC.prctl(24, capability, 0, 0, 0)


class Gateway:
    """A gateway process with a home of its own."""

    def __init__(self, program: str, folder: str, auth_dir: str, world: World, name: str = "1", python: str = "",
                 by_flag: bool = False, hook: Optional[Dict[str, str]] = None, plain: bool = False) -> None:
        home = os.path.join(folder, f"home{name}")
        os.makedirs(home, exist_ok=True)
        self.log_path = os.path.join(folder, f"gateway{name}.log")
        environ = {"HOME": home, "PATH": os.environ.get("PATH", ""), "LANG": "C.UTF-8", "PYTHONDONTWRITEBYTECODE": "1",
                   "HTTPS_PROXY": world.url, "https_proxy": world.url, "SSL_CERT_FILE": world.authority,
                   "NO_PROXY": "127.0.0.1,localhost", "no_proxy": "127.0.0.1,localhost", **(hook or {})}
        if not by_flag:
            environ["PI_CODING_AGENT_DIR"] = auth_dir
        command = [python or sys.executable, "-u"]
        command += [os.path.join(HERE, "hook.py"), program] if hook else [program]
        command += ["--port", "0", "--pid-file", os.path.join(home, "gateway.pid"), "--log-level", "debug"]
        command += ["--auth-dir", auth_dir] if by_flag else []
        with open(self.log_path, "ab") as log:
            self.process = subprocess.Popen(
                command, env=environ, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=log,
                preexec_fn=give_up_rights if plain else None)
        self.port = 0
        self.banner: List[str] = []
        ready = threading.Event()

        def listen() -> None:
            for line in self.process.stdout:
                text = line.decode("utf-8", "replace")
                self.banner.append(text)
                found = re.search(r"listening on http://[^:]+:(\d+)", text)
                if found:
                    self.port = int(found.group(1))
                    ready.set()
            ready.set()

        threading.Thread(target=listen, daemon=True).start()
        if not ready.wait(30) or not self.port:
            self.stop()
            raise Failed("the gateway did not start: " + self.log().strip()[-300:])

    @property
    def pid(self) -> int:
        return self.process.pid

    def log(self) -> str:
        with open(self.log_path, encoding="utf-8", errors="replace") as file:
            return file.read() + "".join(self.banner)

    def kill(self) -> None:
        """kill -9"""
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()

    def stop(self, patience_s: float = 15.0) -> None:
        if self.process.poll() is None:
            with contextlib.suppress(OSError):
                os.kill(self.pid, signal.SIGCONT)
            self.process.terminate()
            try:
                self.process.wait(patience_s)
            except subprocess.TimeoutExpired:
                self.kill()

    def ask(self, provider: str = "anthropic", stream: bool = False, api: str = "chat",
            timeout_s: float = 120.0) -> "Answer":
        """A request as a client sends it. Never raises: status 0 stands for a broken connection."""
        started = time.monotonic()
        path = {"chat": "/v1/chat/completions", "messages": "/v1/messages", "responses": "/v1/responses"}[api]
        body = {"model": MODELS[provider], "max_tokens": 16, "stream": stream,
                "messages": [{"role": "user", "content": "ping"}]}
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=timeout_s)
        try:
            version = {"anthropic-version": "2023-06-01"} if api == "messages" else {}
            connection.request("POST", path, json.dumps(body), {
                "content-type": "application/json", "authorization": "Bearer x", **version})
            reply = connection.getresponse()
            text, status = reply.read().decode("utf-8", "replace"), reply.status
        except (OSError, http.client.HTTPException) as error:
            text, status = repr(error), 0
        finally:
            connection.close()
        is_right = status == 200 and f"pong-{provider}" in text
        return Answer(provider, status, is_right, time.monotonic() - started, text)


class Answer(NamedTuple):
    """What came back to a client."""

    provider: str
    status: int
    is_right: bool
    seconds: float
    text: str

    @property
    def brief(self) -> str:
        """Without secrets."""
        return f"{self.provider} {self.status} after {self.seconds:.1f} s: {LEAK.sub('<TOKEN>', self.text)[:300]}"


def together(calls: Sequence[Callable[[], Any]], at: float = 0.0) -> List[Any]:
    """The results of calls that are made at the same moment, `at` if that is given."""
    results: List[Any] = [None] * len(calls)
    barrier = threading.Barrier(len(calls) + 1)

    def run(place: int) -> None:
        barrier.wait()
        while at and time.time() < at:
            time.sleep(max(0.0, min(0.05, at - time.time())))
        results[place] = calls[place]()

    threads = [threading.Thread(target=run, args=(place,), daemon=True) for place in range(len(calls))]
    for thread in threads:
        thread.start()
    barrier.wait()
    for thread in threads:
        thread.join()
    return results


class Later:
    """A call under way in a thread."""

    def __init__(self, call: Callable[[], Any]) -> None:
        self.result: Any = None
        self.thread = threading.Thread(target=self._run, args=(call,), daemon=True)
        self.thread.start()

    def _run(self, call: Callable[[], Any]) -> None:
        try:
            self.result = call()
        except BaseException as error:          # shown by whoever asks for the result
            self.result = error

    def get(self, timeout_s: float = 120.0) -> Any:
        self.thread.join(timeout_s)
        expect(not self.thread.is_alive(), f"no result within {timeout_s} s")
        if isinstance(self.result, BaseException):
            raise self.result
        return self.result


def wait_until(condition: Callable[[], Any], timeout_s: float, what: str) -> float:
    """Waits, and returns how long that took."""
    started = time.monotonic()
    while not condition():
        expect(time.monotonic() - started < timeout_s, f"{what}: not within {timeout_s:.0f} s")
        time.sleep(0.01)
    return time.monotonic() - started


# --- pi ---------------------------------------------------------------------------------------------------------------


class Pi(NamedTuple):
    """A node and the folder that has pi in its node_modules."""

    node: str
    modules: str

    def start(self, auth: str, world: World, providers: str, pace_ms: int, home: str, call: bool = True,
              starts: int = 10) -> Any:
        environ = {"HOME": home, "PATH": os.environ.get("PATH", ""), "HTTPS_PROXY": world.url, "PI_OFFLINE": "1",
                   "NODE_EXTRA_CA_CERTS": world.authority, "NO_PROXY": "127.0.0.1,localhost",
                   "PI_CODING_AGENT_DIR": os.path.dirname(auth)}
        command = [self.node, os.path.join(HERE, "pi_client.mjs"), "--modules", self.modules, "--auth", auth,
                   "--providers", providers, "--pace", str(pace_ms), "--starts", str(starts),
                   *(["--call"] if call else [])]
        return subprocess.Popen(command, env=environ, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                                stderr=subprocess.PIPE)

    @staticmethod
    def finish(process: Any) -> Dict[str, Any]:
        """Ends the client and returns its figures."""
        process.stdin.close()
        process.stdin = None
        try:
            out, errors = process.communicate(timeout=60)
        except subprocess.TimeoutExpired:
            process.kill()
            out, errors = process.communicate()
        lines = out.decode().split("\n")
        figures = [line for line in lines if line.startswith("{")]
        expect(figures, f"pi ended with status {process.returncode}: {errors.decode()[-500:]}")
        return json.loads(figures[-1])

    def strict(self, *paths: str) -> str:
        """What pi's strict reader says against these files, "" when it takes them."""
        done = subprocess.run([self.node, os.path.join(HERE, "pi_strict.mjs"), "--modules", self.modules, *paths],
                              stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=60, check=False)
        return "" if done.returncode == 0 else done.stdout.decode()


def find_pi(node: str = "", modules: str = "") -> Tuple[Optional[Pi], str]:
    """(pi, "") or (None, why there is none)."""
    node = node or os.environ.get("PI_NODE") or shutil.which("node") or ""
    modules = os.path.abspath(modules or os.environ.get("PI_MODULES") or HERE)
    if not node:
        return None, "no node program"
    try:
        done = subprocess.run([node, "--version"], stdout=subprocess.PIPE, check=False)
    except OSError:
        return None, "the node program cannot be run"
    version = [int(part) for part in re.findall(rb"\d+", done.stdout)[:2]]
    if version < [22, 19]:
        return None, f"node {done.stdout.decode().strip()} is too old for pi"
    package = os.path.join(modules, "node_modules", "@earendil-works", "pi-coding-agent", "package.json")
    if not os.path.exists(package):
        return None, "no @earendil-works/pi-coding-agent in node_modules (npm install it, and name its folder)"
    return Pi(node, modules), ""


def strict(data: Dict[str, Any]) -> str:
    """The same rules as pi's strict reader, for where there is no pi."""
    for name, entry in data.items():
        if not isinstance(entry, dict):
            return f"{name} is no object"
        if entry.get("type") == "api_key":
            values = entry.get("env", {})
            if isinstance(entry.get("key", ""), str) and isinstance(values, dict) and \
                    all(isinstance(value, str) for value in values.values()):
                continue
        elif entry.get("type") == "oauth" and isinstance(entry.get("access"), str) and \
                isinstance(entry.get("refresh"), str) and type(entry.get("expires")) in (int, float):
            continue
        return f"{name} is not valid"
    return ""


# --- A test's surroundings --------------------------------------------------------------------------------------------


class Stage:
    """A folder with auth.json, the world around it and gateways that use it; all ended by `close`."""

    certificates: Optional[Tuple[str, str]] = None

    def __init__(self, program: str, python: str = "", pi: Optional[Pi] = None) -> None:
        self.program, self.python, self.pi = os.path.abspath(program), python or sys.executable, pi
        self.folder = tempfile.mkdtemp(prefix="rig-")
        os.chmod(self.folder, 0o755)
        self.make_certificates()
        self.world = World(Stage.certificates)
        self.claude, self.codex = (self.world.accounts[name] for name in ("anthropic", "openai-codex"))
        self.auth_dir = os.path.join(self.folder, "agent")
        os.mkdir(self.auth_dir, 0o700)
        self.auth = os.path.join(self.auth_dir, "auth.json")
        self.lock = self.auth + ".lock"
        self.gateways: List[Gateway] = []
        self.written = ""

    @staticmethod
    def make_certificates() -> None:
        if Stage.certificates is None:
            Stage.certificates = make_certificates(tempfile.mkdtemp(prefix="rig-tls-"))

    def write(self, claude_s: float = -5.0, codex_s: float = 1e6, extra: Optional[Dict[str, Any]] = None,
              **fields: Any) -> None:
        """auth.json with log-ins whose stored `expires` is so many seconds away, amid entries of all kinds."""
        expires = {"anthropic": claude_s, "openai-codex": codex_s}
        logins = {name: {**account.entry(**fields), "expires": int((time.time() + expires[name]) * 1000)}
                  for name, account in self.world.accounts.items()}
        for account in self.world.accounts.values():        # what is stored counts here, so that it can be in the past
            for facts in account.issued.values():
                facts[1] = max(facts[1], time.time() + expires[account.provider])
        others = list({**OTHERS, **(extra or {})}.items())
        self.written = dump(dict([*others[:3], ("anthropic", logins["anthropic"]), *others[3:],
                                  ("openai-codex", logins["openai-codex"])]))
        write_atomic(self.auth, self.written)

    def gateway(self, count: int = 1, mixed: bool = False, **options: Any) -> List[Gateway]:
        """More gateways; `mixed`: half of them are told the folder by a flag, half by the variable."""
        new = [Later(lambda name=str(len(self.gateways) + place + 1): Gateway(
            self.program, self.folder, self.auth_dir, self.world, name, self.python,
            by_flag=mixed and bool(int(name) % 2), **options)) for place in range(count)]
        started = [later.get() for later in new]
        self.gateways += started
        return started

    def stored(self, provider: str = "anthropic") -> Dict[str, Any]:
        return load(self.auth).get(provider, {})

    def seconds_left(self, provider: str = "anthropic") -> float:
        return self.stored(provider)["expires"] / 1000 - time.time()

    def check_file(self, lock_free: bool = True) -> None:
        """What has to hold of auth.json whenever a test is over."""
        with open(self.auth, encoding="utf-8") as file:
            text = file.read()
        before, after = slices(self.written), slices(text)
        for name in OTHERS:
            expect(after.get(name) == before[name], f"the entry {name} was changed")
        expect(list(after) == list(before), f"entries {list(before)} became {list(after)}")
        expect(not strict(json.loads(text)), strict(json.loads(text)))
        expect(mode_of(self.auth) == "0o600", f"mode {mode_of(self.auth)}")
        if self.pi:
            expect(not self.pi.strict(self.auth), self.pi.strict(self.auth) if self.pi else "")
        if lock_free:
            expect(not os.path.exists(self.lock), "the lock directory was left behind")

    def leftovers(self) -> List[str]:
        """Files beside auth.json that nobody asked for."""
        return sorted(name for name in os.listdir(self.auth_dir) if name not in ("auth.json", "auth.json.lock"))

    def check_logs(self) -> None:
        for gateway in self.gateways:
            found = LEAK.search(gateway.log())
            before = gateway.log()[max(0, found.start() - 120):found.start()] if found else ""
            expect(not found, f"a token in the log, after: {before}")
            expect("Traceback" not in gateway.log(), "a traceback in the log: " + gateway.log()[-1500:])

    def close(self) -> None:
        for later in [Later(gateway.stop) for gateway in self.gateways]:
            later.thread.join()
        self.world.close()
        shutil.rmtree(self.folder, ignore_errors=True)


@contextlib.contextmanager
def staged(*arguments: Any) -> Iterator[Stage]:
    stage = Stage(*arguments)
    try:
        yield stage
    finally:
        stage.close()


def remove_certificates() -> None:
    if Stage.certificates:
        shutil.rmtree(os.path.dirname(Stage.certificates[0]), ignore_errors=True)
        Stage.certificates = None


def table(rows: Sequence[Tuple[Any, ...]]) -> str:
    """Rows in columns."""
    texts = [[str(cell) for cell in row] for row in rows]
    widths = [max(len(row[place]) for row in texts if len(row) > place) for place in range(max(map(len, texts)))]
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip() for row in texts)


def free_of_leaks(answers: Sequence[Answer]) -> None:
    for answer in answers:
        expect(not LEAK.search(answer.text), f"a token in an answer: {answer.brief}")
