#!/usr/bin/env python3
"""Three copies behind nginx and behind HAProxy, as the README configures them: under load, one copy is killed and one is
drained. Only requests that were under way on the killed copy may fail.

    python .ci/cluster.py PIGATEWAY README

Needs nginx and haproxy (exit status 77 without). Exit status 0 when all was kept, else 1.
"""
from __future__ import annotations

import http.client
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from typing import Any, List, Tuple

PORTS = (4001, 4002, 4003)
CLIENTS, STEP_S = 24, 3.0
NGINX = """daemon off; pid {folder}/nginx.pid; error_log {folder}/error.log; worker_processes 1;
events {{ worker_connections 4096; }}
http {{ access_log off; client_body_temp_path {folder}/a; proxy_temp_path {folder}/b; fastcgi_temp_path {folder}/c;
uwsgi_temp_path {folder}/d; scgi_temp_path {folder}/e;
{snippet}
}}
"""


def start_copy(program: str, port: int, home: str) -> subprocess.Popen[bytes]:
    environ = {name: value for name, value in os.environ.items()
               if not name.lower().endswith("_proxy") and not name.startswith("PI_")}
    return subprocess.Popen(
        [sys.executable, program, "--port", str(port), "--pid-file", f"{home}/{port}.pid", "--demo-delay-ms", "5",
         "--log-level", "error"], env={**environ, "HOME": home}, stdout=subprocess.DEVNULL)


def wait_for(port: int, limit_s: float = 15.0) -> None:
    deadline = time.monotonic() + limit_s
    while True:
        try:
            connection = http.client.HTTPConnection("127.0.0.1", port, timeout=2)
            connection.request("GET", "/health")
            if connection.getresponse().status == 200:
                return
        except (OSError, http.client.HTTPException):
            pass
        finally:
            connection.close()
        if time.monotonic() > deadline:
            raise SystemExit(f"port {port} does not answer")
        time.sleep(0.1)


class Load:
    """Clients that ask without a pause, half of them for streams."""

    def __init__(self, port: int) -> None:
        self.port = port
        self.fine = 0
        self.failed: List[Tuple[float, float, str]] = []
        self._over = threading.Event()
        self._lock = threading.Lock()
        self._threads = [threading.Thread(target=self._ask, args=(number % 2 == 0,)) for number in range(CLIENTS)]
        for thread in self._threads:
            thread.start()

    def _ask(self, stream: bool) -> None:
        body = json.dumps({"model": "demo", "stream": stream, "messages": [{"role": "user", "content": "word " * 60}]})
        while not self._over.is_set():
            began, problem = time.monotonic(), ""
            connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=20)
            try:
                connection.request("POST", "/v1/chat/completions", body, {"content-type": "application/json"})
                response = connection.getresponse()
                data = response.read()
                whole = data.endswith(b"data: [DONE]\n\n") if stream else b'"choices"' in data
                if response.status != 200 or not whole or b'"error"' in data:
                    problem = f"{response.status} {data[-120:]!r}"
            except (OSError, http.client.HTTPException) as error:
                problem = repr(error)[:120]
            finally:
                connection.close()
            with self._lock:
                if problem:
                    self.failed.append((began, time.monotonic(), problem))
                else:
                    self.fine += 1

    def end(self) -> None:
        self._over.set()
        for thread in self._threads:
            thread.join(30)


def run(name: str, command: List[str], port: int, program: str, home: str) -> bool:
    copies = [start_copy(program, port, home) for port in PORTS]
    proxy: Any = None
    try:
        for copy_port in PORTS:
            wait_for(copy_port)
        proxy = subprocess.Popen(command)
        wait_for(port)
        load = Load(port)
        time.sleep(STEP_S)
        dying_from = time.monotonic()
        copies[0].kill()
        copies[0].wait()
        dead_at = time.monotonic()
        time.sleep(STEP_S)
        copies[0] = start_copy(program, PORTS[0], home)
        time.sleep(STEP_S)
        draining_from = time.monotonic()
        copies[1].send_signal(signal.SIGTERM)
        status = copies[1].wait(20)
        time.sleep(STEP_S)
        load.end()
    finally:
        for process in [proxy, *copies]:
            if process and process.poll() is None:
                process.terminate()
                process.wait(20)
    innocent = [f"asked {began - dead_at:.3f} s after the kill and {began - draining_from:.3f} s after the drain began, ended "
                f"{ended - began:.3f} s later: {problem}"
                for began, ended, problem in load.failed if began > dead_at or ended < dying_from]
    is_good = status == 0 and not innocent and load.fine > 500
    print(f"{'ok  ' if is_good else 'FAIL'}  {name}: {load.fine} answered, {len(load.failed)} failed of those under way on "
          f"the killed copy, {len(innocent)} of others; the drained copy ended with {status}", *innocent[:5], sep="\n  ")
    return is_good


def main() -> int:
    if not (shutil.which("nginx") and shutil.which("haproxy")):
        print("there is no nginx or no haproxy")
        return 77
    program, readme = map(os.path.abspath, sys.argv[1:3])
    with open(readme, encoding="utf-8") as file:
        snippets = dict(re.findall(r"```(nginx|haproxy)\n(.*?)```", file.read(), re.DOTALL))
    with tempfile.TemporaryDirectory() as folder:
        with open(f"{folder}/nginx.conf", "w", encoding="utf-8") as file:
            file.write(NGINX.format(folder=folder, snippet=snippets["nginx"]))
        with open(f"{folder}/haproxy.cfg", "w", encoding="utf-8") as file:
            file.write(snippets["haproxy"])
        good = [run("nginx", ["nginx", "-c", f"{folder}/nginx.conf"], 8080, program, folder),
                run("HAProxy", ["haproxy", "-f", f"{folder}/haproxy.cfg"], 8081, program, folder)]
    return 0 if all(good) else 1


if __name__ == "__main__":
    sys.exit(main())
