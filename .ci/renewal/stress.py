"""Eight gateways, pi and a third tool on one auth.json, for minutes: nobody is logged out, nothing is lost.

    python stress.py pigateway.py [--minutes 5] [--no-pi] [--pi FOLDER --node NODE] ...

Without pi, all that write do so atomically, and no reader may ever see anything but whole JSON. With pi, which writes
in place, a bad read counts only when the same open file does not become whole within two seconds.
"""
import argparse
import json
import os
import random
import subprocess
import sys
import threading
import time
from typing import Any, Dict, List, Optional, Sequence

import rig
from authserver import MARGIN_S
from rig import ForeignLock, Gateway, Later, Pi, Stage, dump, expect, load, slices, table, write_atomic, write_in_place


# --- A reader without the lock (a process of its own) -----------------------------------------------------------------


def check_entries(data: Any, number: Dict[str, int], figures: Dict[str, Any], extras: bool) -> None:
    import re
    if not isinstance(data, dict) or any(name not in data for name in rig.OTHERS):
        figures["lost"] += 1
        return
    for provider in ("anthropic", "openai-codex"):
        entry = data.get(provider) or {}
        found = re.search(rig.MARK + r"(\d{5})", str(entry.get("refresh")))
        if entry.get("type") != "oauth" or not entry.get("access") or not found:
            figures["logouts"] += 1
        elif int(found.group(1)) < number.get(provider, 0):
            figures["went back"] += 1
        else:
            number[provider] = int(found.group(1))
        if extras and entry.get("x-note") != {"keep": ["me", 1]}:
            figures["extra fields lost"] += 1


def read_forever(path: str, extras: bool) -> None:
    """Reads until the input ends, then prints figures."""
    figures = {"reads": 0, "versions": 0, "in place": 0, "torn": 0, "missing": 0, "lost": 0, "logouts": 0,
               "went back": 0, "extra fields lost": 0, "modes": {}, "samples": []}
    stop = threading.Event()
    threading.Thread(target=lambda: (sys.stdin.read(), stop.set()), daemon=True).start()
    good, number = b"", {}
    while not stop.is_set():
        time.sleep(0.0003)
        figures["reads"] += 1
        try:
            descriptor = os.open(path, os.O_RDONLY)
        except OSError:
            figures["missing"] += 1
            continue
        try:
            content = os.read(descriptor, 1 << 20)
            if content == good:
                continue
            mode = oct(os.fstat(descriptor).st_mode & 0o7777)
            figures["modes"][mode] = figures["modes"].get(mode, 0) + 1
            end, was_bad, locked = time.monotonic() + 2, False, os.path.exists(path + ".lock")
            while True:
                try:
                    data = json.loads(content)
                    break
                except ValueError:
                    was_bad = True
                    if time.monotonic() > end:
                        data = None
                        break
                content = os.pread(descriptor, 1 << 20, 0)
            if was_bad:
                figures["in place" if data is not None else "torn"] += 1
                if len(figures["samples"]) < 3:
                    figures["samples"].append(f"lock {locked}")
            if data is not None:
                good = content
                figures["versions"] += 1
                check_entries(data, number, figures, extras)
        finally:
            os.close(descriptor)
    print(json.dumps(figures), flush=True)


class LockFreeReader:
    def __init__(self, path: str, extras: bool) -> None:
        self.process = subprocess.Popen([sys.executable, os.path.abspath(__file__), "--reader", path, str(int(extras))],
                                        stdin=subprocess.PIPE, stdout=subprocess.PIPE, preexec_fn=lambda: os.nice(5))

    def finish(self) -> Dict[str, Any]:
        return json.loads(self.process.communicate(timeout=60)[0])


class Counter(threading.Thread):
    """A third tool that counts in an entry of its own, under the lock; a count that goes back was lost by somebody."""

    def __init__(self, path: str, in_place: bool, pause_s: float) -> None:
        super().__init__(daemon=True)
        self.path, self.in_place, self.pause_s = path, in_place, pause_s
        self.count = self.lost = 0
        self.slowest = 0.0
        self.error = ""
        self.stopped = threading.Event()

    def run(self) -> None:
        lock = ForeignLock(self.path)
        try:
            while not self.stopped.wait(self.pause_s * random.uniform(0.5, 1.5)):
                self.slowest = max(self.slowest, lock.acquire())
                try:
                    data = load(self.path)
                    if int(data["zz-counter"]["key"]) != self.count:
                        self.lost += 1
                    self.count += 1
                    data["zz-counter"]["key"] = str(self.count)
                    (write_in_place if self.in_place else write_atomic)(self.path, dump(data))
                finally:
                    lock.release()
        except Exception as error:
            self.error = repr(error)


# --- The test ---------------------------------------------------------------------------------------------------------


def run(program: str, seconds: float, pi: Optional[Pi], rate: float = 5.0, count: int = 8, python: str = "",
        pis: int = 1, mix: Sequence[float] = (), seed: int = 0, quiet: bool = False) -> Dict[str, Any]:
    """Figures of a run. Raises rig.Failed."""
    chance = random.Random(seed)
    mix = mix or ((40, 30, 30) if pi else (0, 50, 50))

    def life(provider: str) -> float:
        """`expires_in`: long enough that pi, too, leaves the token alone for some seconds (it renews five minutes
        ahead), or short, or next to nothing."""
        kind, = chance.choices(("long", "short", "blink"), mix)
        return 0.3 if kind == "blink" else chance.uniform(2, 6) + (300 + MARGIN_S[provider] if kind == "long" else 0)

    stage = Stage(program, python, pi)
    try:
        for account in (stage.claude, stage.codex):
            account.life = lambda provider=account.provider: life(provider)
            account.before = lambda: time.sleep(chance.uniform(0.01, 0.15))
            account.after = lambda: time.sleep(chance.uniform(0.01, 0.15))
            account.superseded_s = 30.0
        exotic = {} if pi else {"exotic": {"type": "api_key", "key": "k", "7": 1, "long": 12345678901234567890}}
        extra = {**exotic, "zz-counter": {"type": "api_key", "key": "0"}}
        stage.write(1.0, 1.0, extra, **{"x-note": {"keep": ["me", 1]}})
        stage.gateway(count, mixed=True)
        clients = [pi.start(stage.auth, stage.world, "anthropic,openai-codex", 1200, stage.folder)
                   for _ in range(pis if pi else 0)]
        for client in clients:
            expect(client.stdout.readline() == b"ready\n", "pi did not start")
        reader = LockFreeReader(stage.auth, not pi)
        counter = Counter(stage.auth, bool(pi), 0.7)
        counter.start()
        started, answers, guard = time.monotonic(), [], threading.Lock()
        ways = [("anthropic", "messages"), ("anthropic", "chat"), ("openai-codex", "chat"),
                ("openai-codex", "messages"), ("groq", "chat")]

        def ask(gateway: Gateway, way: Any, stream: bool) -> None:
            answer = gateway.ask(way[0], stream, way[1])
            with guard:
                answers.append(answer)

        def client(gateway: Gateway, own: random.Random) -> None:
            while time.monotonic() < started + seconds:
                time.sleep(own.expovariate(rate / len(stage.gateways) * 0.8))
                ask(gateway, own.choice(ways), own.random() < 0.5)

        threads = [threading.Thread(target=client, args=(gateway, random.Random(f"{seed}-{place}")), daemon=True)
                   for place, gateway in enumerate(stage.gateways)]
        for thread in threads:
            thread.start()
        while time.monotonic() < started + seconds:
            time.sleep(min(max(count * 2 / (rate * 0.2), 0.5), 10.0))       # a fifth of the requests come in bursts
            together = [threading.Thread(target=ask, args=(gateway, chance.choice(ways), chance.random() < 0.5))
                        for gateway in stage.gateways for _ in range(2)]
            for thread in together:
                thread.start()
            for thread in together:
                thread.join()
        for thread in threads:
            thread.join(150)
            expect(not thread.is_alive(), "a request was not answered within 150 s")
        elapsed = time.monotonic() - started
        counter.stopped.set()
        counter.join(90)
        pi_figures = [Pi.finish(client) for client in clients] if pi else []
        seen = reader.finish()
        time.sleep(0.2)
        for later in [Later(gateway.stop) for gateway in stage.gateways]:
            later.get()
        return judge(stage, pi, answers, counter, pi_figures, seen, elapsed, extra, quiet)
    finally:
        stage.close()


def judge(stage: Stage, pi: Optional[Pi], answers: List[rig.Answer], counter: Counter, pi_figures: List[Dict[str, Any]],
          seen: Dict[str, Any], elapsed: float, extra: Dict[str, Any], quiet: bool) -> Dict[str, Any]:
    world, problems = stage.world, []
    wrong = [answer for answer in answers if not answer.is_right]
    times = sorted(answer.seconds for answer in answers)
    with open(stage.auth, encoding="utf-8") as file:
        text = file.read()
    before, after = slices(stage.written), slices(text)
    changed = [name for name in before if name not in ("anthropic", "openai-codex", "zz-counter")
               and after.get(name) != before[name]]
    accounts = list(world.accounts.values())
    alive = {account.provider: load(stage.auth)[account.provider]["refresh"] == account.refresh_token
             for account in accounts}
    agents: Dict[str, int] = {}
    for account in accounts:
        for agent, number in account.agents.items():
            agents[agent] = agents.get(agent, 0) + number
    leaks = 0
    try:
        stage.check_logs()
        rig.free_of_leaks(answers)
    except rig.Failed as error:
        leaks = 1
        problems.append(str(error))
    verdict = (pi.strict(stage.auth) if pi else rig.strict(json.loads(text)))
    rows = [
        ("gateways", len(stage.gateways), None), ("pi clients", len(pi_figures), None),
        ("seconds", f"{elapsed:.0f}", None), ("requests", len(answers), None), ("not answered right", len(wrong), 0),
        ("slowest answer, s", f"{times[-1]:.2f}", None), ("median, s", f"{times[len(times) // 2]:.3f}", None),
        ("refreshes", sum(account.refreshed for account in accounts), None), ("  asked by", dict(agents), None),
        ("refused refreshes", sum(account.refused for account in accounts), 0),
        ("malformed refreshes", sum(account.malformed for account in accounts), 0),
        ("refreshes at once, most", max(account.most_in_flight for account in accounts), 1),
        ("API calls refused", sum(account.calls_refused for account in accounts), 0),
        ("log-ins alive at the end", sum(alive.values()), 2), ("log-outs seen", seen["logouts"], 0),
        ("entries lost, seen", seen["lost"], 0), ("log-in went back, seen", seen["went back"], 0),
        ("extra fields lost, seen", seen["extra fields lost"], 0), ("other entries changed", len(changed), 0),
        ("counts of the third tool", counter.count, None), ("  lost", counter.lost, 0),
        ("  longest wait, s", f"{counter.slowest:.2f}", None), ("lock-free reads", seen["reads"], None),
        ("  versions seen", seen["versions"], None), ("  file missing", seen["missing"], 0),
        ("  torn", seen["torn"], 0), ("  caught in place", seen["in place"], None if pi else 0),
        ("modes seen", ",".join(seen["modes"]), "0o600"), ("mode at the end", rig.mode_of(stage.auth), "0o600"),
        ("files left beside it", ",".join(stage.leftovers()) or "none", "none"),
        ("lock left", os.path.exists(stage.lock), False), ("strict reader", verdict or "ok", "ok"),
        ("logs without a token", not leaks, True)]
    for figures in pi_figures:
        rows += [("pi: asked for a key", figures["calls"], None), ("  got one", figures["ok"], figures["calls"]),
                 ("  slowest, ms", figures["slowest_ms"], None), ("  errors", figures["errors"] or "none", "none"),
                 ("  API statuses", figures["statuses"], {"200": figures["ok"]})]
    bad = [name for name, value, wanted in rows if wanted is not None and value != wanted]
    if not quiet or bad:
        print(table([(name, value, "" if wanted is None else "ok" if value == wanted else f"WRONG, wanted {wanted}")
                     for name, value, wanted in rows]))
        for answer in wrong[:5]:
            print("  wrong:", answer.brief)
        for line in [*problems, *(problem for account in accounts for problem in account.problems[:3]), counter.error,
                     *(f"changed: {name}: {before[name]!r} -> {after.get(name)!r}" for name in changed[:3])]:
            if line:
                print("  note:", line)
    expect(not bad and not counter.error, "not kept: " + ", ".join(name.strip() for name in bad) + counter.error)
    return {name.strip(): value for name, value, _ in rows}


def main() -> int:
    if sys.argv[1:2] == ["--reader"]:
        read_forever(sys.argv[2], sys.argv[3] == "1")
        return 0
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("program", help="path of pigateway.py")
    parser.add_argument("--minutes", type=float, default=5.0)
    parser.add_argument("--rate", type=float, default=5.0, help="requests a second, over all gateways")
    parser.add_argument("--gateways", type=int, default=8)
    parser.add_argument("--python", default="", help="the Python that runs the gateways")
    parser.add_argument("--no-pi", action="store_true")
    parser.add_argument("--pi", default="", help="folder that has pi in its node_modules")
    parser.add_argument("--node", default="")
    parser.add_argument("--pis", type=int, default=1)
    parser.add_argument("--mix", default="", help="weights of long, short and next to no lives of tokens: 2,1,1")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    pi, why = (None, "not asked for") if options.no_pi else rig.find_pi(options.node, options.pi)
    if not pi:
        print("without pi:", why)
    try:
        run(options.program, options.minutes * 60, pi, options.rate, options.gateways, options.python, options.pis,
            [float(part) for part in options.mix.split(",") if part], options.seed)
    except rig.Failed as error:
        print("FAILED:", error)
        return 1
    finally:
        rig.remove_certificates()
    print("all kept")
    return 0


if __name__ == "__main__":
    sys.exit(main())
