#!/usr/bin/env python3
"""Log-ins of pigateway.py through a real browser: Chromium without a window, against fakes of the vendors.

    python .ci/browser_logins.py PIGATEWAY [--tests FOLDER] [--pictures FOLDER]

PIGATEWAY is the program; the fakes are the class `FakeVendors` of test_pigateway.py, beside it or in --tests. They
answer under the vendors' own host names, behind a proxy and with a certificate that the browser is told to take; the
program and the browser are as they come. --pictures keeps PNG files of the pages that a user gets to see.

Exit status: 0 all is well, 1 something is not, 77 there is no Chromium (packages chromium and chromium-driver) or no
openssl. Needs no package beside these. Chromium is driven by chromedriver's HTTP interface.
"""
from __future__ import annotations

import argparse
import base64
import contextlib
import hashlib
import http.client
import importlib
import json
import os
import re
import shlex
import shutil
import signal
import socket
import stat
import subprocess
import sys
import tempfile
import threading
import time
import traceback
import unittest.mock
import urllib.parse
from typing import Any, Callable, Dict, Iterator, List, Optional, Tuple

PROVIDERS = ("anthropic", "openai-codex", "google-gemini-cli", "google-antigravity", "openrouter")
LIMIT_S = 10.0                      # for any one step; each takes far less than a second
WHOLE_LIMIT_S = 120                 # for everything
SKIPPED = 77
DONE = ("Back to the terminal", "close this window")        # what the page says after the browser came back
STRAY = ("Not this log-in", "another log-in")
OTHERS = {"zeta": {"type": "api_key", "key": "sk-zeta-0123456789abcdef", "note": "caf\u00e9 \u2603"},
          "alpha": {"type": "api_key"}}     # what is in auth.json already
ELEMENT = "element-6066-11e4-a52e-4f735466cecf"
FLAGS = ("--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--disable-quic", "--no-first-run",
         "--no-default-browser-check", "--disable-background-networking", "--disable-component-update",
         "--disable-sync", "--disable-extensions", "--disable-breakpad", "--disable-crash-reporter",
         "--password-store=basic", "--window-size=960,540")


def until(what: str, ready: Callable[[], Any], limit_s: float = LIMIT_S) -> Any:
    """The first true value of `ready()`."""
    deadline = time.monotonic() + limit_s
    while True:
        value = ready()
        if value:
            return value
        assert time.monotonic() < deadline, f"waited {limit_s:g} s in vain for {what}"
        time.sleep(0.01)


def read_text(path: str) -> str:
    with contextlib.suppress(FileNotFoundError), open(path, encoding="utf-8", errors="replace") as file:
        return file.read()
    return ""


def end(process: subprocess.Popen[bytes]) -> None:
    """Ends a process that leads a group of its own, and what it has started."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, number)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(3)


# --- The browser ------------------------------------------------------------------------------------------------------


class DriverError(Exception):
    """What chromedriver could not do."""


class Driver:
    """chromedriver: JSON over HTTP."""

    def __init__(self, program: str, environ: Dict[str, str], folder: str) -> None:
        self.path = os.path.join(folder, "chromedriver.txt")
        with open(self.path, "wb") as log:
            self.process = subprocess.Popen([program, "--port=0"], stdin=subprocess.DEVNULL, stdout=log, stderr=log,
                                            env=environ, start_new_session=True)
        try:
            found = until("chromedriver", lambda: re.search(r"successfully on port (\d+)", read_text(self.path)))
        except AssertionError:
            end(self.process)
            raise
        self.port = int(found.group(1))

    def call(self, method: str, path: str, fields: Optional[Dict[str, Any]] = None) -> Any:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=LIMIT_S * 3)
        try:
            body = json.dumps(fields or {}) if method == "POST" else None
            connection.request(method, path, body, {"content-type": "application/json"})
            response = connection.getresponse()
            value = json.loads(response.read())["value"]
        finally:
            connection.close()
        if response.status != 200:
            raise DriverError(f"{value['error']}: {value['message'].splitlines()[0]}")
        return value

    def close(self) -> None:
        end(self.process)


class Browser:
    """One Chromium."""

    def __init__(self, driver: Driver, options: Dict[str, Any]) -> None:
        self.driver = driver
        wanted = {"browserName": "chrome", "pageLoadStrategy": "normal", "goog:chromeOptions": options,
                  "timeouts": {"pageLoad": LIMIT_S * 1000, "script": LIMIT_S * 1000, "implicit": 0}}
        session = driver.call("POST", "/session", {"capabilities": {"alwaysMatch": wanted}})
        self.version = session["capabilities"]["browserVersion"]
        self._path = f"/session/{session['sessionId']}"

    def _call(self, method: str, path: str, **fields: Any) -> Any:
        return self.driver.call(method, self._path + path, fields)

    def new_tab(self) -> str:
        """Opens another tab, and goes there."""
        return self.show(self._call("POST", "/window/new", type="tab")["handle"])

    def show(self, tab: str) -> str:
        self._call("POST", "/window", handle=tab)
        return tab

    def tabs(self) -> List[str]:
        return list(self._call("GET", "/window/handles"))

    def close_other_tabs(self) -> None:
        first, *others = self.tabs()
        for tab in others:
            self.show(tab)
            self._call("DELETE", "/window")
        self.show(first)

    def open(self, url: str) -> None:
        self._call("POST", "/url", url=url)

    def reload(self) -> None:
        self._call("POST", "/refresh")

    def click(self, name: str) -> None:
        """Clicks what has the id."""
        element = self._call("POST", "/element", using="css selector", value=f"#{name}")[ELEMENT]
        self._call("POST", f"/element/{element}/click")

    def run(self, script: str) -> Any:
        return self._call("POST", "/execute/sync", script=script, args=[])

    @property
    def url(self) -> str:
        return str(self._call("GET", "/url"))

    def page(self) -> Tuple[str, str, str]:
        """Title, heading and text of the page, and that a browser reads it as a page of today."""
        title, heading, text, mode, charset, status = self.run(
            "const heading = document.querySelector('h1'), way = performance.getEntriesByType('navigation')[0];"
            "return [document.title, heading ? heading.innerText : '', document.body.innerText, document.compatMode,"
            " document.characterSet, way ? way.responseStatus : 0]")
        assert (mode, charset) == ("CSS1Compat", "UTF-8"), (mode, charset)
        return title, heading, f"{status} {text}"

    def expect(self, status: int, *words: str) -> None:
        """Waits until the page has the title, which is its heading too, and the words."""
        def is_there() -> bool:
            title, heading, text = self.page()
            return title == heading == words[0] and text.startswith(f"{status} ") and all(
                word in text for word in words)
        try:
            until("a page", is_there)
        except AssertionError:
            raise AssertionError(f"no page with {status} {words}, but {self.page()} at {self.url}") from None

    def expect_refused(self, go: Callable[[], None]) -> None:
        """What `go` does leads to a port where nobody listens."""
        try:
            go()
        except DriverError as error:        # which says so for one way to get there, and not for another
            assert "ERR_CONNECTION_REFUSED" in str(error), error
        assert "ERR_CONNECTION_REFUSED" in self.page()[2], f"somebody still answers: {self.page()}"

    def picture(self, path: str) -> None:
        with open(path, "wb") as file:
            file.write(base64.b64decode(self._call("GET", "/screenshot")))

    def quit(self) -> None:
        """Ends Chromium, also one that chromedriver has not started."""
        with contextlib.suppress(DriverError, OSError, http.client.HTTPException):
            self._call("POST", "/goog/cdp/execute", cmd="Browser.close", params={})
        with contextlib.suppress(DriverError, OSError, http.client.HTTPException):
            self._call("DELETE", "")


# --- The program ------------------------------------------------------------------------------------------------------


class LogIn:
    """One `login`, as a process without a terminal. $BROWSER is a script that tells of the address."""

    def __init__(self, desk: Desk, provider: str, opener: str = "") -> None:
        self.desk, self.provider, self.began = desk, provider, time.time()
        desk.count += 1
        name = os.path.join(desk.home, f"login{desk.count}")
        self.told = name + ".url"
        if not opener:
            opener = desk.script(name, f'printf %s "$1" >{name}.new && mv {name}.new {self.told}')
        self._out, self._err = name + ".out", name + ".err"
        environ = {**desk.environ, **desk.world.environ, "BROWSER": f"{opener} %s", "PYTHONDONTWRITEBYTECODE": "1"}
        # files and not pipes: a browser that is still there would keep them open
        with open(self._out, "wb") as out, open(self._err, "wb") as err:
            self.process = subprocess.Popen(
                [sys.executable, desk.program, "login", provider, "--yes"], cwd=desk.home, env=environ,
                stdin=subprocess.DEVNULL, stdout=out, stderr=err, start_new_session=True)
        desk.processes.append(self.process)

    @property
    def out(self) -> str:
        return read_text(self._out)

    @property
    def err(self) -> str:
        return read_text(self._err)

    def url(self) -> str:
        """The address that the browser was given, which stands in the terminal as well."""
        url = until("the program's call of the browser", lambda: read_text(self.told) or self.is_over())
        assert isinstance(url, str), (self.out, self.err)
        assert url in until("the address in the terminal", lambda: re.findall(r"^ *(https://\S+)$", self.out, re.M))
        return url

    def is_over(self) -> bool:
        return self.process.poll() is not None

    def expect_waiting(self) -> None:
        time.sleep(0.05)
        assert not self.is_over(), f"the log-in has ended: {self.out} {self.err}"

    def expect_end(self, status: int) -> None:
        """Waits for the end; nothing may have been shown that is secret."""
        try:
            self.process.wait(LIMIT_S)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"the log-in goes on and on: {self.out} {self.err}") from None
        assert self.process.returncode == status, (self.process.returncode, self.out, self.err)
        said = urllib.parse.unquote(self.out + self.err)
        for secret in ["Traceback", *self.desk.world.secrets]:
            assert secret not in said, f"shows {secret}"

    def expect_success(self, is_quiet: bool = True) -> None:
        self.expect_end(0)
        assert "Logged in to " in self.out and not (is_quiet and self.err), (self.out, self.err)
        self.desk.expect_entry(self.provider, self.began)


class Desk:
    """A place to log in at: a home with an auth.json, the vendors, the browser."""

    def __init__(self, world: Any, browser: Browser, chromium: List[str], home: str, program: str,
                 environ: Dict[str, str], pictures: str) -> None:
        self.world, self.browser, self.chromium, self.home, self.program = world, browser, chromium, home, program
        self.environ, self.pictures = environ, pictures
        self.processes: List[subprocess.Popen[bytes]] = []
        self.count = 0
        self.folder = os.path.join(home, ".pi", "agent")
        self.path = os.path.join(self.folder, "auth.json")

    def script(self, path: str, text: str) -> str:
        with open(path, "w", encoding="utf-8") as file:
            file.write(f"#!/bin/sh\n{text}\n")
        os.chmod(path, 0o700)
        return path

    def begin(self) -> None:
        """Everything as at first."""
        self.world.reset()
        self.browser.close_other_tabs()
        self.browser.open("about:blank")
        shutil.rmtree(self.folder, ignore_errors=True)
        os.makedirs(self.folder, 0o700)
        with open(self.path, "w", encoding="utf-8") as file:
            json.dump(OTHERS, file, indent=2, ensure_ascii=False)
        os.chmod(self.path, 0o600)
        self.before = self.raw

    def finish(self) -> None:
        for process in self.processes:
            if process.poll() is None:
                end(process)
        self.processes.clear()

    @property
    def raw(self) -> bytes:
        with open(self.path, "rb") as file:
            return file.read()

    def expect_unchanged(self) -> None:
        assert self.raw == self.before, "auth.json is another"

    def expect_entry(self, provider: str, began: float) -> None:
        """auth.json has the new log-in and everything else as it was."""
        text = self.raw.decode("utf-8")
        entries = json.loads(text)
        assert list(entries) == [*OTHERS, provider], list(entries)
        assert text == json.dumps({**OTHERS, provider: entries[provider]}, indent=2, ensure_ascii=False)
        self.world.vendors[provider].check_stored(entries[provider], began)
        assert stat.S_IMODE(os.stat(self.path).st_mode) == 0o600 and os.listdir(self.folder) == ["auth.json"]

    def expect_no_faults(self) -> None:
        # Chromium asks this of itself, whoever starts it
        faults = [fault for fault in self.world.faults if "accounts.google.com/ListAccounts" not in fault]
        assert not faults, faults

    def exchanges(self) -> List[str]:
        """The requests that an authorisation code could have gone out with."""
        return [asked for asked in self.world.asked if asked.startswith("POST ") and "ListAccounts" not in asked]

    def picture(self, name: str) -> None:
        if self.pictures:
            self.browser.picture(os.path.join(self.pictures, name + ".png"))

    def open(self, provider: str) -> Tuple[LogIn, str]:
        """Begins a log-in, up to the vendor's page in the browser; also where it leads back to."""
        login = LogIn(self, provider)
        url = login.url()
        self.browser.open(url)
        self.browser.expect(200, f"Log in to {provider}")
        return login, back_address(url)


def back_address(url: str) -> str:
    query = dict(urllib.parse.parse_qsl(urllib.parse.urlsplit(url).query))
    return query.get("redirect_uri") or query["callback_url"]


def with_query(url: str, **fields: str) -> str:
    return f"{url}?{urllib.parse.urlencode(fields)}"


def connections(port: int) -> int:
    """How many connections of this machine lead to the port."""
    with open("/proc/net/tcp", encoding="ascii") as file:
        rows = [line.split() for line in file][1:]
    return sum(row[3] == "01" and row[2].endswith(f":{port:04X}") for row in rows)


# --- What has to hold -------------------------------------------------------------------------------------------------


def allow(desk: Desk, provider: str) -> None:
    """A log-in, with answers on its way that are not for it, and with the page loaded again at the end."""
    browser = desk.browser
    login, back = desk.open(provider)
    consent = browser.tabs()[0]
    if provider == "anthropic":
        desk.picture("consent")
    browser.new_tab()
    if "/oauth/callback/" in back:          # the address itself is the secret
        browser.open(with_query(back[:-4] + "0000", code="stray"))
        browser.expect(404, "Not found")
    else:
        for fields in ({"code": "stray", "state": "0" * 32}, {"code": "stray"}, {"code": "stray", "state": ""},
                       {"error": "access_denied", "state": "0" * 32}):
            browser.open(with_query(back, **fields))
            browser.expect(400, *STRAY)
    desk.picture(f"stray-{provider}")
    browser.open(urllib.parse.urljoin(back, "/"))
    browser.expect(404, "Not found")
    login.expect_waiting()
    assert not desk.exchanges(), desk.exchanges()

    browser.show(consent)
    browser.click("allow")
    browser.expect(200, *DONE)
    desk.picture(f"success-{provider}")
    login.expect_success()
    after, exchanges = desk.raw, desk.exchanges()
    browser.expect_refused(browser.reload)
    browser.new_tab()
    browser.expect_refused(lambda: browser.open(with_query(back, code="again", state="again")))
    assert desk.raw == after and desk.exchanges() == exchanges
    desk.expect_no_faults()


def deny(desk: Desk, provider: str) -> None:
    login, _ = desk.open(provider)
    desk.browser.click("deny")
    desk.browser.expect(200, "Log-in refused")
    desk.picture(f"deny-{provider}")
    login.expect_end(1)
    assert re.fullmatch("pigateway: the log-in was refused in the browser: [^\n]+\n", login.err), login.err
    assert not desk.exchanges(), desk.exchanges()
    desk.expect_unchanged()
    desk.expect_no_faults()


def refused_exchange(desk: Desk, provider: str) -> None:
    """The browser has done its part, but the vendor does not take the code."""
    login, _ = desk.open(provider)
    desk.world.scenario = "expire"
    desk.browser.click("allow")
    desk.browser.expect(200, *DONE)
    login.expect_end(1)
    assert re.fullmatch("pigateway: [^\n]+\n", login.err), login.err
    desk.expect_unchanged()


def loaded_twice(desk: Desk, provider: str, step: str) -> None:
    """The last page is loaded again while the code is exchanged."""
    reached, go_on = threading.Event(), threading.Event()

    def hold(_: Any) -> None:
        reached.set()
        go_on.wait(LIMIT_S)

    desk.world.instead[provider, step] = [hold]
    login, _ = desk.open(provider)
    desk.browser.click("allow")
    desk.browser.expect(200, *DONE)
    assert reached.wait(LIMIT_S), "no exchange"
    desk.browser.expect_refused(desk.browser.reload)
    login.expect_waiting()
    desk.expect_unchanged()
    go_on.set()
    login.expect_success()
    assert desk.world.vendors[provider].steps.count(step) == 1, desk.world.vendors[provider].steps
    desk.expect_no_faults()


def speculative(desk: Desk, provider: str) -> None:
    """Connections that browsers make in advance, and others that say nothing, are in nobody's way."""
    vendor = desk.world.vendors[provider]

    def with_hints(ask: Any) -> Any:
        answer, back = vendor.authorize(ask), back_address("?" + urllib.parse.urlencode(ask.query))
        origin = urllib.parse.urljoin(back, "/")
        hints = "".join(f'<link rel="preconnect" href="{origin}"{more}>' for more in ("", " crossorigin"))
        return answer._replace(body=answer.body.replace(b"<head>", b"<head>" + hints.encode()))

    desk.world.instead[provider, "authorize"] = [with_hints]
    login, back = desk.open(provider)
    port = urllib.parse.urlsplit(back).port or 0
    ahead = until("a connection that the browser makes in advance", lambda: connections(port))
    with contextlib.ExitStack() as stack:
        for number in range(24):
            idle = stack.enter_context(socket.create_connection(("127.0.0.1", port), timeout=LIMIT_S))
            time.sleep(0.005)               # not a burst, which would come to the end of the listener's queue
            if number % 3:                  # the first words of a request, or of TLS
                idle.sendall(b"GET /callback?code=x HTT" if number % 3 == 1 else b"\x16\x03\x01\x02\x00\x01")
        assert connections(port) >= ahead + 24
        clicked = time.monotonic()
        desk.browser.click("allow")
        desk.browser.expect(200, *DONE)
        assert time.monotonic() - clicked < LIMIT_S / 2, "the page came late"
        login.expect_success()
    desk.expect_no_faults()


def given_up(desk: Desk, provider: str) -> None:
    """A log-in is given up and begun again; then the user finds the page of the first one."""
    first, _ = desk.open(provider)
    old = desk.browser.tabs()[0]
    os.kill(first.process.pid, signal.SIGINT)
    first.expect_end(130)
    desk.expect_unchanged()
    new = desk.browser.new_tab()
    second, _ = desk.open(provider)
    desk.browser.show(old)
    deny_url = desk.browser.run("return document.getElementById('deny').href")
    for go in (lambda: desk.browser.click("allow"), lambda: desk.browser.open(deny_url)):
        go()
        desk.browser.expect(400, *STRAY)
        second.expect_waiting()
    assert not desk.exchanges(), desk.exchanges()
    desk.browser.show(new)
    desk.browser.click("allow")
    desk.browser.expect(200, *DONE)
    second.expect_success()
    desk.expect_no_faults()


def own_browser(desk: Desk, provider: str) -> None:
    """The program starts the browser itself, and does not wait until that is closed."""
    profile = os.path.join(desk.home, "own")
    command = " ".join(map(shlex.quote, [*desk.chromium, f"--user-data-dir={profile}", "--remote-debugging-port=0"]))
    login = LogIn(desk, provider, desk.script(os.path.join(desk.home, "own.sh"), f'exec {command} "$1"'))
    port = until("the browser", lambda: read_text(os.path.join(profile, "DevToolsActivePort")).partition("\n")[0]
                 or login.is_over(), LIMIT_S * 2)
    assert isinstance(port, str), (login.out, login.err)
    try:
        browser = Browser(desk.browser.driver, {"debuggerAddress": f"127.0.0.1:{port}"})
        try:
            browser.show(browser.tabs()[0])
            browser.expect(200, f"Log in to {provider}")
            browser.click("allow")
            browser.expect(200, *DONE)
            login.expect_success(is_quiet=False)        # what Chromium says goes there as well
        finally:
            browser.quit()
    finally:
        end(login.process)
    desk.expect_no_faults()


CHECKS: Tuple[Tuple[str, Callable[[Desk], None]], ...] = (
    *((f"{provider}: allow", lambda desk, provider=provider: allow(desk, provider)) for provider in PROVIDERS),
    *((f"{provider}: deny", lambda desk, provider=provider: deny(desk, provider)) for provider in PROVIDERS),
    ("anthropic: the vendor refuses the code", lambda desk: refused_exchange(desk, "anthropic")),
    ("openai-codex: the last page is loaded twice", lambda desk: loaded_twice(desk, "openai-codex", "token")),
    ("openrouter: the last page is loaded twice", lambda desk: loaded_twice(desk, "openrouter", "key")),
    ("anthropic: connections in advance", lambda desk: speculative(desk, "anthropic")),
    ("openrouter: connections in advance", lambda desk: speculative(desk, "openrouter")),
    ("google-gemini-cli: given up and begun again", lambda desk: given_up(desk, "google-gemini-cli")),
    ("openai-codex: the program starts the browser", lambda desk: own_browser(desk, "openai-codex")),
)


# ----------------------------------------------------------------------------------------------------------------------


def fake_vendors(folders: List[str]) -> Any:
    """The module with the class `FakeVendors`."""
    sys.path[:0] = folders
    sys.dont_write_bytecode = True
    try:
        import pytest  # noqa: F401
    except ImportError:                     # its decorators are all that is used of it here
        sys.modules["pytest"] = unittest.mock.MagicMock()
    return importlib.import_module("test_pigateway")


def key_of(folder: str) -> str:
    """What Chromium calls the key of the vendors' certificate by."""
    command = "openssl x509 -in host.crt -pubkey -noout | openssl pkey -pubin -outform der"
    der = subprocess.run(command, shell=True, cwd=folder, stdout=subprocess.PIPE, check=True, timeout=LIMIT_S).stdout
    return base64.b64encode(hashlib.sha256(der).digest()).decode("ascii")


def expect_free_ports(world: Any) -> None:
    """The ports that the vendors know are nobody's; some may be for a moment, as the near end of a connection."""
    def is_free(port: int) -> bool:
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            with contextlib.suppress(OSError):
                probe.bind(("127.0.0.1", port))
                return True
        return False

    for provider in PROVIDERS:
        redirects = world.vendors[provider].redirects
        for text in re.findall(r"//localhost:(\d+)/", getattr(redirects, "pattern", redirects)):
            until(f"port {text}, where {provider} comes back to", lambda text=text: is_free(int(text)))


@contextlib.contextmanager
def a_desk(arguments: argparse.Namespace, chromium: str, chromedriver: str) -> Iterator[Desk]:
    program = os.path.abspath(arguments.program)
    module = fake_vendors([os.path.abspath(folder) for folder in (arguments.tests, os.path.dirname(program)) if folder])
    with contextlib.ExitStack() as stack:
        home = stack.enter_context(tempfile.TemporaryDirectory(ignore_cleanup_errors=True)
                                   if sys.version_info >= (3, 10) else tempfile.TemporaryDirectory())
        world = module.FakeVendors(home, is_attended=True)
        stack.callback(world.close)
        world.proxy.server.handle_error = lambda *_: None       # Chromium's own errands, which lead nowhere here
        expect_free_ports(world)
        environ = {"PATH": os.environ.get("PATH", os.defpath), "HOME": home, "TMPDIR": home, "LANG": "C.UTF-8"}
        flags = [*FLAGS, f"--proxy-server={world.proxy.url}", f"--ignore-certificate-errors-spki-list={key_of(home)}"]
        driver = Driver(chromedriver, environ, home)
        stack.callback(driver.close)
        browser = Browser(driver, {"binary": chromium, "args": [
            *flags, f"--user-data-dir={os.path.join(home, 'profile')}"]})
        stack.callback(browser.quit)
        desk = Desk(world, browser, [chromium, *flags], home, program, environ, arguments.pictures)
        stack.callback(desk.finish)
        yield desk


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("program", metavar="PIGATEWAY")
    parser.add_argument("--tests", metavar="FOLDER")
    parser.add_argument("--pictures", metavar="FOLDER", default="")
    arguments = parser.parse_args()
    chromium = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    chromedriver = shutil.which("chromedriver")
    if not chromium or not chromedriver or not shutil.which("openssl"):
        print("skipped: needs chromium, chromedriver and openssl", file=sys.stderr)
        return SKIPPED

    def too_late(*_: Any) -> None:
        raise TimeoutError(f"not done within {WHOLE_LIMIT_S} s")

    signal.signal(signal.SIGALRM, too_late)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    signal.alarm(WHOLE_LIMIT_S)
    began, failed = time.monotonic(), 0
    if arguments.pictures:
        os.makedirs(arguments.pictures, exist_ok=True)
    with a_desk(arguments, chromium, chromedriver) as desk:
        print(f"Chromium {desk.browser.version}, ready after {time.monotonic() - began:.1f} s", flush=True)
        for name, check in CHECKS:
            started = time.monotonic()
            try:
                desk.begin()
                check(desk)
                words = "ok"
            except (AssertionError, DriverError, OSError, http.client.HTTPException, ValueError, KeyError):
                failed += 1
                traceback.print_exc(limit=-2)
                words = "FAILED"
                with contextlib.suppress(Exception):
                    desk.picture(f"failure-{failed}")
            finally:
                desk.finish()
            print(f"{time.monotonic() - started:5.1f} s  {name}: {words}", flush=True)
        signal.alarm(0)
    print(f"{time.monotonic() - began:5.1f} s  altogether")
    print(f"{len(CHECKS) - failed} passed, {failed} failed")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
