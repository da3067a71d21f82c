"""Kills, hangs and accidents around a shared auth.json: the others recover, and nothing is lost.

    python kill9.py pigateway.py [--short] [--only NAME[,NAME]] [--pi FOLDER --node NODE] ...

The short form makes a dead holder's lock look older instead of waiting for it to age.
"""
import argparse
import concurrent.futures
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
import traceback
from typing import Any, Callable, Dict, List, Optional, Tuple

import rig
from authserver import Drop, Give
from rig import (Answer, Failed, ForeignLock, Later, Stage, age, dump, expect, load, mode_of, slices, table, together,
                 wait_until, write_atomic, write_in_place)

RECOVERY_S = 35.0
CASES: Dict[str, Tuple[Callable[..., str], str]] = {}
IS_SHORT = False


def case(kind: str) -> Any:
    """Registers a test: `short` runs in the short form too, `slow` only when all are asked for."""
    def register(function: Callable[..., str]) -> Callable[..., str]:
        CASES[function.__name__.replace("_", "-")] = function, kind
        return function
    return register


def all_right(answers: List[Answer], limit_s: float = RECOVERY_S) -> float:
    """The slowest of answers that all have to be right."""
    for answer in answers:
        expect(answer.is_right, f"not answered: {answer.brief}")
        expect(answer.seconds < limit_s, f"too late: {answer.brief}")
    return max(answer.seconds for answer in answers)


def counts(stage: Stage, refreshed: int, refused: int = 0, provider: str = "anthropic") -> None:
    account = stage.world.accounts[provider]
    expect((account.refreshed, account.refused, account.malformed) == (refreshed, refused, 0),
           f"refreshed {account.refreshed} (wanted {refreshed}), refused {account.refused} (wanted {refused}), "
           f"malformed {account.malformed} {account.problems[:2]}")


def hold_still(stage: Stage) -> None:
    """For the lock of a process that was killed: as if most of its 30 s had passed already, in the short form."""
    if IS_SHORT and os.path.isdir(stage.lock):
        age(stage.lock, 27)


def foreign_holder(stage: Stage, beats: bool = True) -> subprocess.Popen:
    """A process that takes the lock and touches it, as another tool at work."""
    code = ("import os, sys, time\nos.mkdir(sys.argv[1])\nprint('held', flush=True)\nwhile True:\n    time.sleep(1)\n"
            + ("    os.utime(sys.argv[1])\n" if beats else ""))
    process = subprocess.Popen([sys.executable, "-c", code, stage.lock], stdout=subprocess.PIPE)
    expect(process.stdout.readline() == b"held\n", "the other tool did not get the lock")
    return process


# --- Once for all -----------------------------------------------------------------------------------------------------


@case("short")
def fifty_at_expiry(stage: Stage) -> str:
    """Fifty requests at the instant of expiry: one refresh, all answered."""
    stage.write(claude_s=1000)
    gateway, = stage.gateway()
    stage.write(claude_s=2.0)
    at = stage.stored()["expires"] / 1000 + 0.05
    stage.claude.after = lambda: time.sleep(0.5)
    answers = together([lambda: gateway.ask("anthropic")] * 50, at)
    slowest = all_right(answers, 10)
    counts(stage, 1)
    return f"1 refresh, 50 right, slowest {slowest:.2f} s"


@case("short")
def fifty_on_four(stage: Stage) -> str:
    """Fifty requests on four gateways, both log-ins at their end: one refresh each."""
    stage.write(claude_s=-1.0, codex_s=-1.0)
    gateways = stage.gateway(4, mixed=True)
    for account in (stage.claude, stage.codex):
        account.after = lambda: time.sleep(0.3)
    answers = together([lambda gateway=gateways[place % 4], way=("anthropic", "openai-codex")[place // 4 % 2]:
                        gateway.ask(way, bool(place % 3)) for place in range(50)])
    slowest = all_right(answers, 15)
    counts(stage, 1)
    counts(stage, 1, provider="openai-codex")
    return f"1 refresh each, 50 right, slowest {slowest:.2f} s"


@case("short")
def ahead_of_expiry(stage: Stage) -> str:
    """A token near its end is renewed before it ends, and requests need not wait for that."""
    stage.claude.before = lambda: time.sleep(0.3)
    stage.write(claude_s=1000)
    gateway, = stage.gateway()
    stage.write(claude_s=6.0)
    first = gateway.ask()
    end, slowest = time.monotonic() + 10, first.seconds
    while not stage.claude.refreshed and time.monotonic() < end:
        answer = gateway.ask()
        expect(answer.is_right, answer.brief)
        slowest = max(slowest, answer.seconds)
        time.sleep(0.05)
    counts(stage, 1)
    left = stage.written and json.loads(stage.written)["anthropic"]["expires"] / 1000 - stage.claude.times[0]
    expect(left > 0, f"asked for a new token {-left:.1f} s after the old one had ended")
    return f"asked {left:.1f} s before the end; slowest request {slowest:.2f} s while the server took 0.3 s"


# --- Dead holders -----------------------------------------------------------------------------------------------------


@case("short")
def stale_lock_race(stage: Stage) -> str:
    """Gateways that find the same dead lock at once: still one refresh each time."""
    stage.write()
    gateways = stage.gateway(3 if IS_SHORT else 6)
    rounds, slowest = (4 if IS_SHORT else 40), 0.0
    for turn in range(rounds):
        stage.write()
        os.mkdir(stage.lock)
        age(stage.lock, 31 + turn % 3)
        before = stage.claude.refreshed
        slowest = max(slowest, all_right(together([gateway.ask for gateway in gateways for _ in range(2)]), 10))
        expect(stage.claude.refreshed - before == 1, f"{stage.claude.refreshed - before} refreshes in round {turn}")
        expect(stage.claude.refused == 0, f"a refused refresh in round {turn}")
    expect(stage.claude.most_in_flight == 1, f"{stage.claude.most_in_flight} refreshes at once")
    return f"{rounds} rounds on {len(gateways)} gateways, 1 refresh each, slowest {slowest:.2f} s"


@case("slow")
def stale_lock_race_with_pi(stage: Stage) -> str:
    """The same with pi among those who wait. Its way of stealing can take a lock that was made anew a moment before;
    what counts is that this is survived: every log-in alive, every request answered."""
    if not stage.pi:
        return "skipped: no pi"
    stage.write()
    stage.claude.reuse_s = 0
    gateways = stage.gateway(4)
    pi = stage.pi.start(stage.auth, stage.world, "anthropic", 30, stage.folder, starts=0)
    expect(pi.stdout.readline() == b"ready\n", "pi did not start")
    rounds, double, lost = 30, 0, 0
    for turn in range(rounds):
        ForeignLock(stage.auth).acquire()       # and never given back
        stage.write()
        age(stage.lock, 29.0)
        before = stage.claude.refreshed
        waiting = [Later(gateway.ask) for gateway in gateways]
        time.sleep(0.5)
        age(stage.lock, 29.9)
        expect(stage.claude.refreshed == before, "the lock was not respected")
        answers = [later.get() for later in waiting]
        wait_until(lambda: not os.path.isdir(stage.lock), 40, "the lock is held")
        double += stage.claude.refreshed - before > 1
        lost += not all(answer.is_right for answer in answers)
    figures = rig.Pi.finish(pi)
    expect(not lost, f"in {lost} of {rounds} rounds a request was not answered; refused {stage.claude.refused}")
    stage.write()
    return f"{rounds} rounds, {double} with more than one refresh, {stage.claude.refused} refused; " \
           f"pi: {figures['errors']}"


@case("short")
def dead_foreign_holder(stage: Stage) -> str:
    """kill -9 of another tool that holds the lock."""
    stage.write()
    gateways = stage.gateway(3)
    holder = foreign_holder(stage)
    waiting = [Later(gateway.ask) for gateway in gateways]
    time.sleep(1.0)
    expect(stage.claude.asked == 0, "refreshed while another tool held the lock")
    holder.kill()
    holder.wait()
    hold_still(stage)
    started = time.monotonic()
    valid = gateways[0].ask("openai-codex")
    expect(valid.is_right and valid.seconds < 2, f"a valid log-in was held up: {valid.brief}")
    for later in waiting:
        expect(later.get().is_right, later.get().brief)
    seconds = time.monotonic() - started
    expect(seconds < RECOVERY_S, f"recovered only after {seconds:.1f} s")
    counts(stage, 1)
    return f"recovered {seconds:.1f} s after the kill"


@case("slow")
def patient_with_the_living(stage: Stage) -> str:
    """A live tool that keeps the lock for 34 s is waited for, not robbed."""
    stage.write()
    gateway, = stage.gateway()
    holder = foreign_holder(stage)
    try:
        waiting = Later(gateway.ask)
        time.sleep(34)
        expect(stage.claude.asked == 0, "the lock of a live tool was taken away")
        expect(os.path.isdir(stage.lock), "the lock of a live tool was removed")
    finally:
        holder.kill()
        holder.wait()
    os.rmdir(stage.lock)
    answer = waiting.get()
    expect(answer.is_right, answer.brief)
    counts(stage, 1)
    return f"answered {answer.seconds - 34:.1f} s after the lock was free"


def killed(stage: Stage, rotated: bool, reuse_s: float = 0.0) -> Tuple[List[Any], float]:
    """A gateway killed in the middle of a refresh; returns the others, with requests waiting, and when it died."""
    stage.write()
    stage.claude.reuse_s = reuse_s
    first, *others = stage.gateway(3)
    reached, is_first = threading.Event(), [True]

    def pause() -> None:
        if not is_first[0]:
            return
        is_first[0] = False
        reached.set()
        if not rotated:
            time.sleep(1.0)
            raise Drop
        time.sleep(3.0)

    setattr(stage.claude, "after" if rotated else "before", pause)
    victim = Later(first.ask)
    expect(reached.wait(20), "no refresh")
    waiting = [Later(gateway.ask) for gateway in others]
    time.sleep(0.3)
    first.kill()
    died = time.monotonic()
    hold_still(stage)
    expect(victim.get().status == 0, "the killed gateway answered")
    return [(gateway, later) for gateway, later in zip(others, waiting)], died


@case("short")
def killed_before_rotation(stage: Stage) -> str:
    """kill -9 of a gateway whose refresh the server has not yet done."""
    others, died = killed(stage, False)
    for gateway, later in others:
        valid = gateway.ask("openai-codex")
        expect(valid.is_right and valid.seconds < 2, f"a valid log-in was held up: {valid.brief}")
        expect(later.get().is_right, later.get().brief)
    seconds = time.monotonic() - died
    expect(seconds < RECOVERY_S, f"recovered only after {seconds:.1f} s")
    counts(stage, 1)
    return f"recovered {seconds:.1f} s after the kill, 1 refresh"


@case("short")
def killed_after_rotation(stage: Stage) -> str:
    """kill -9 between the server's rotation and its answer, with a server that repeats the answer for a while."""
    others, died = killed(stage, True, reuse_s=120)
    for _, later in others:
        expect(later.get().is_right, later.get().brief)
    seconds = time.monotonic() - died
    expect(seconds < RECOVERY_S, f"recovered only after {seconds:.1f} s")
    counts(stage, 1)
    expect(stage.stored()["refresh"] == stage.claude.refresh_token, "the stored log-in is dead")
    return f"recovered {seconds:.1f} s after the kill"


@case("long")
def killed_and_log_in_lost(stage: Stage) -> str:
    """The same with a server that does not repeat itself: the log-in is over, that is said, a new one is taken up."""
    others, died = killed(stage, True)
    answers = [later.get() for _, later in others]
    seconds = time.monotonic() - died
    expect(seconds < RECOVERY_S, f"answered only after {seconds:.1f} s")
    for answer in answers:
        expect(answer.status == 401 and re.search(r"pigateway\.py \S*log", answer.text),
               f"no clear message: {answer.brief}")
    expect(stage.claude.refused <= len(others), f"{stage.claude.refused} refused refreshes for {len(others)} gateways")
    expect(others[0][0].ask("openai-codex").is_right, "the other provider suffers")
    stage.check_file()
    stage.claude.before = stage.claude.after = None
    stage.write(claude_s=1000)
    all_right([gateway.ask() for gateway, _ in others], 2)
    return f"said so after {seconds:.1f} s: {answers[0].text[:160]}"


def killed_in_write(stage: Stage, moment: str, reuse_s: float) -> str:
    stage.write()
    stage.claude.reuse_s = reuse_s
    flag = os.path.join(stage.folder, "flag")
    first, = stage.gateway(hook={"RIG_AT": moment, "RIG_FLAG": flag})
    others = stage.gateway(2)
    # the first write hook may catch is a probe; what counts is one after the refresh
    victim = Later(first.ask)
    wait_until(lambda: os.path.exists(flag), 20, "no write seen")
    asked = stage.claude.refreshed
    beside = {name: mode_of(os.path.join(stage.auth_dir, name)) for name in stage.leftovers()}
    expect(all(mode == "0o600" for mode in beside.values()), f"open to others: {beside}")
    waiting = [Later(gateway.ask) for gateway in others]
    time.sleep(0.2)
    first.kill()
    died = time.monotonic()
    hold_still(stage)
    victim.get()
    for later in waiting:
        expect(later.get().is_right, later.get().brief)
    seconds = time.monotonic() - died
    expect(seconds < RECOVERY_S, f"recovered only after {seconds:.1f} s")
    counts(stage, 1)
    if moment == "replaced":
        wait_until(lambda: True, 1, "")
        if os.path.isdir(stage.lock):           # nobody needed it; whoever does next removes it
            age(stage.lock, 31)
            stage.write()
            expect(others[0].ask().is_right, "the next refresh failed")
    return f"recovered {seconds:.1f} s after the kill ({asked} refreshes before it), beside the file: " \
           f"{', '.join(stage.leftovers()) or 'nothing'}"


@case("short")
def killed_in_write_before_replace(stage: Stage) -> str:
    """kill -9 when the new file is written but not yet in place."""
    return killed_in_write(stage, "replace", 120)


@case("long")
def killed_in_write_half(stage: Stage) -> str:
    """kill -9 when half of the new file is written."""
    return killed_in_write(stage, "write", 120)


@case("short")
def killed_in_write_after_replace(stage: Stage) -> str:
    """kill -9 when the new file is in place and the lock still held."""
    return killed_in_write(stage, "replaced", 0)


@case("long")
def killed_at_random(stage: Stage) -> str:
    """kill -9 at random moments of constant refreshing; the file is whole and its log-ins alive each time."""
    import random
    chance = random.Random(1)
    stage.claude.life = stage.codex.life = lambda: 0.01
    for account in (stage.claude, stage.codex):
        account.before = account.after = lambda: time.sleep(chance.uniform(0, 0.02))
    stage.claude.reuse_s = stage.codex.reuse_s = 120
    stage.write()
    rounds = 25
    for turn in range(rounds):
        gateway, = stage.gateway()
        busy = [Later(lambda way=way: [gateway.ask(way, timeout_s=10) for _ in range(60)])
                for way in ("anthropic", "openai-codex")]
        time.sleep(chance.uniform(0.02, 0.5))
        gateway.kill()
        for later in busy:
            later.get()
        stage.check_file(lock_free=False)
        if os.path.isdir(stage.lock):
            age(stage.lock, 31)
    gateway, = stage.gateway()
    slowest = all_right([gateway.ask(way) for way in ("anthropic", "openai-codex")], 10)
    counts(stage, stage.claude.refreshed)
    counts(stage, stage.codex.refreshed, provider="openai-codex")
    return f"{rounds} kills, {stage.claude.refreshed} refreshes, then {slowest:.2f} s; " \
           f"left: {len(stage.leftovers())} files"


# --- Others hang ------------------------------------------------------------------------------------------------------


@case("short")
def slow_server_keeps_the_lock_fresh(stage: Stage) -> str:
    """A slow authorization server: the lock is touched at least every 5 s, stays empty, and is given back at once."""
    stage.write()
    gateway, = stage.gateway()
    wait_s = 6.0 if IS_SHORT else 12.0
    stage.claude.before = lambda: time.sleep(wait_s)
    waiting, oldest, started = Later(gateway.ask), 0.0, 0.0
    while waiting.thread.is_alive():
        try:
            oldest = max(oldest, time.time() - os.stat(stage.lock).st_mtime)
            started = started or time.monotonic()
            expect(not os.listdir(stage.lock), "something lies in the lock directory")
        except OSError:
            expect(not started or stage.claude.refreshed, "the lock vanished in between")
        time.sleep(0.02)
    held = time.monotonic() - started
    expect(waiting.get().is_right, waiting.get().brief)
    expect(oldest < 5.5, f"not touched for {oldest:.1f} s")
    expect(held < wait_s + 1, f"held for {held:.1f} s")
    expect(not os.path.exists(stage.lock), "still locked")
    return f"held {held:.1f} s for a server that took {wait_s:.0f} s, at most {oldest:.1f} s untouched"


@case("short")
def one_provider_hangs(stage: Stage) -> str:
    """Provider A's authorization server hangs: B's requests go on, with a valid token and with one to renew."""
    stage.write(codex_s=1e6)
    gateway, second = stage.gateway(2)
    stage.claude.before = lambda: (_ for _ in ()).throw(Drop) if time.sleep(60) else None
    stuck = Later(gateway.ask)
    wait_until(lambda: stage.claude.asked, 10, "no refresh")
    all_right([gateway.ask("openai-codex"), second.ask("openai-codex"), gateway.ask("groq")], 2)
    data = load(stage.auth)
    data["openai-codex"]["expires"] = int(time.time() * 1000) - 1000
    write_atomic(stage.auth, dump(data))
    stage.written = dump(data)
    same = Later(lambda: gateway.ask("openai-codex"))
    other = second.ask("openai-codex")
    slowest = max(same.get().seconds, other.seconds)
    expect(same.get().is_right, f"same gateway: {same.get().brief}")
    expect(other.is_right, f"other gateway: {other.brief}")
    expect(slowest < 25, f"B had to wait {slowest:.1f} s")
    counts(stage, 1, provider="openai-codex")
    failed = stuck.get()
    expect(failed.status in (401, 408, 500, 502, 503, 504) and failed.seconds < 45, failed.brief)
    stage.claude.before = None
    return f"B to renew: {same.get().seconds:.1f} s in the same gateway, {other.seconds:.1f} s in another; " \
           f"A: {failed.status} after {failed.seconds:.1f} s"


@case("long")
def one_provider_hangs_for_all(stage: Stage) -> str:
    """The same with six gateways that are asked for A all the time: B still gets its turn."""
    stage.write()
    gateways = stage.gateway(6)
    stage.claude.before = lambda: (_ for _ in ()).throw(Drop) if time.sleep(60) else None
    stop, failed = threading.Event(), []

    def nag(gateway: Any) -> None:
        while not stop.is_set():
            answer = gateway.ask(timeout_s=130)
            failed.append(answer)
            stop.wait(0.5)

    nagging = [Later(lambda gateway=gateway: nag(gateway)) for gateway in gateways]
    worst, wrong = 0.0, []
    try:
        time.sleep(2)
        for turn in range(4):
            data = load(stage.auth)
            data["openai-codex"]["expires"] = int(time.time() * 1000) - 1000
            write_atomic(stage.auth, dump(data))
            answer = gateways[turn % 6].ask("openai-codex")
            worst = max(worst, answer.seconds)
            if not answer.is_right:
                wrong.append(answer.brief)
    finally:
        stop.set()
        stage.claude.before = None
    for later in nagging:
        later.get(180)
    expect(not wrong, f"{len(wrong)} of 4: {wrong[:1]}")
    expect(worst < RECOVERY_S, f"B had to wait {worst:.1f} s")
    stage.written = dump(load(stage.auth))
    return f"B waited {worst:.1f} s at most; A: {len(failed)} failures, slowest " \
           f"{max(answer.seconds for answer in failed):.1f} s"


@case("short")
def server_is_down(stage: Stage) -> str:
    """Errors of the authorization server are told clearly, damage nothing, and are over when they are over."""
    stage.write()
    gateway, = stage.gateway()
    seen = []
    bodies = [Give(500, {"error": "server_error"}), Give(429, {"error": {"type": "rate"}}, {"retry-after": "1"}),
              Give(503, b"<html>busy</html>"), Give(200, b"not json"), Give(200, {}),
              Give(200, {"access_token": "a" * 20}),
              Give(200, {"access_token": 5, "refresh_token": "x", "expires_in": 9}),
              Give(200, {"access_token": "a" * 20, "refresh_token": "b" * 20, "expires_in": "soon"}),
              Give(200, [1]), Drop()]
    for problem in bodies[:2] if IS_SHORT else bodies:
        before = load(stage.auth)["anthropic"]
        stage.claude.before = lambda problem=problem: (_ for _ in ()).throw(problem)
        answer = gateway.ask()
        seen.append(answer.status)
        if answer.status != 200:
            expect(answer.status in (401, 429, 500, 502, 503, 504), answer.brief)
        after = load(stage.auth)["anthropic"]
        expect(not rig.strict(load(stage.auth)), f"after {problem!r}: {rig.strict(load(stage.auth))}")
        if after != before:
            seen[-1] = f"{seen[-1]}/stored"
            stage.write()
        else:
            gateway.stop()                      # it does not ask again for a while
            gateway, = stage.gateway()
    stage.claude.before = None
    all_right([gateway.ask()], 5)
    return "statuses " + " ".join(map(str, seen))


@case("long")
def dripping_server(stage: Stage) -> str:
    """An authorization server that sends its answer in drops does not hold the lock for long."""
    stage.write()
    gateway, = stage.gateway()
    stage.claude.before = lambda: (_ for _ in ()).throw(Give(0, ((1.0, b" ") for _ in range(60))))
    waiting = Later(gateway.ask)
    wait_until(lambda: os.path.isdir(stage.lock), 10, "no lock")
    seconds = wait_until(lambda: not os.path.isdir(stage.lock), 60, "the lock is held")
    expect(seconds < 20, f"held for {seconds:.1f} s")
    expect(waiting.get().status in (502, 503, 504), waiting.get().brief)
    return f"held {seconds:.1f} s; {waiting.get().status} after {waiting.get().seconds:.1f} s"


@case("short")
def echoed_tokens(stage: Stage) -> str:
    """An authorization server that repeats the refresh token in its error: neither answers nor logs do."""
    statuses = []
    gateway, = stage.gateway()
    for status, error in ((400, "invalid_grant"), (500, "server_error"), (403, "")):
        stage.write(codex_s=-5)
        for account, way in ((stage.claude, "anthropic"), (stage.codex, "openai-codex")):
            told = f"the token {account.refresh_token} is no good"
            account.before = lambda told=told: (_ for _ in ()).throw(Give(
                status, {"error": error, "error_description": told} if error else told.encode()))
            answers = [gateway.ask(way)]
            rig.free_of_leaks(answers)
            statuses.append(answers[0].status)
    stage.check_logs()
    return f"statuses {statuses}"


@case("short")
def redirected(stage: Stage) -> str:
    """A redirection of the token request is not followed: the refresh token goes nowhere else."""
    statuses = []
    for status in (301, 302, 303, 307, 308):
        stage.write()
        calls = stage.codex.calls
        gateway, = stage.gateway()
        stage.claude.before = lambda status=status: (_ for _ in ()).throw(Give(
            status, b"", {"location": "https://chatgpt.com/backend-api/codex/responses"}))
        answer = gateway.ask()
        expect(answer.status in (401, 502, 503), answer.brief)
        expect(stage.codex.calls == calls and stage.claude.asked == len(statuses) + 1, f"followed a {status}")
        statuses.append(answer.status)
        gateway.stop()
    return f"statuses {statuses}"


@case("long")
def answer_lost(stage: Stage) -> str:
    """The connection breaks after the server has rotated: told as what it is, and tried again with the same token later
    (some servers repeat their answer)."""
    stage.write()
    gateway, = stage.gateway()
    stage.claude.reuse_s = 300
    stage.claude.after = lambda: (_ for _ in ()).throw(Drop)
    answer = gateway.ask()
    asked = stage.claude.asked
    stage.claude.after = None
    if answer.is_right:
        return f"right at once, asked {asked} times"
    seconds = wait_until(lambda: gateway.ask().is_right, 40, "no recovery")
    counts(stage, 1)
    return f"{answer.status}, asked {asked} times; recovered {seconds:.0f} s later"


# --- Others write without a lock --------------------------------------------------------------------------------------


def rotate_elsewhere(stage: Stage, in_place: bool) -> Callable[[], None]:
    """A hook: another tool refreshes with the same token first, and stores the result without any lock."""
    def hook() -> None:
        stage.claude.before = None
        entry = {**load(stage.auth)["anthropic"], **stage.claude.entry()}
        data = load(stage.auth)
        data["anthropic"] = entry
        (write_in_place if in_place else write_atomic)(stage.auth, dump(data))
    return hook


@case("short")
def rotated_without_a_lock(stage: Stage) -> str:
    """invalid_grant because another tool was first: its log-in is taken up."""
    results = []
    for in_place in (False, True):
        for openai_errors in (False, True):
            stage.write()
            stage.claude.refused = 0
            stage.claude.openai_errors = openai_errors
            gateway, = stage.gateway()
            stage.claude.before = rotate_elsewhere(stage, in_place)
            results.append(gateway.ask())
            expect(results[-1].is_right, f"in place {in_place}, OpenAI's error {openai_errors}: {results[-1].brief}")
            expect(stage.claude.refused == 1, f"refused {stage.claude.refused}")
            expect(stage.stored()["refresh"] == stage.claude.refresh_token, "the other tool's log-in was overwritten")
    return f"{len(results)} times, slowest {all_right(results, 10):.2f} s"


@case("short")
def log_in_is_over(stage: Stage) -> str:
    """invalid_grant for good: a clear message that names a command, the server is not pestered, a new log-in works."""
    stage.write()
    stage.claude.issue()                        # somebody else has rotated, and nobody knows the new token
    gateway, = stage.gateway()
    answers = together([gateway.ask] * 10) + [gateway.ask() for _ in range(5)]
    for answer in answers:
        expect(answer.status == 401, answer.brief)
        expect(re.search(r"pigateway\.py \S*log-?in", answer.text), f"names no command: {answer.brief}")
    expect(stage.claude.asked <= 3, f"asked {stage.claude.asked} times")
    expect(gateway.ask("openai-codex").is_right, "the other provider suffers")
    stage.check_file()
    text = answers[0].text
    stage.write(claude_s=1000)
    all_right([gateway.ask()], 2)
    stage.write(claude_s=-5)
    all_right([gateway.ask()], 5)
    return f"asked {stage.claude.asked - 1} times for 15 requests: {text[:150]}"


@case("short")
def edited_meanwhile(stage: Stage) -> str:
    """What others write without a lock while a refresh is under way survives; a log-in removed meanwhile stays away."""
    stage.write()
    gateway, = stage.gateway()

    def edit(change: Callable[[Dict[str, Any]], Any]) -> Callable[[], None]:
        def hook() -> None:
            stage.claude.before = None
            data = load(stage.auth)
            change(data)
            write_atomic(stage.auth, dump(data))
        return hook

    stage.claude.before = edit(lambda data: data.update({"zz-new": {"type": "api_key", "key": "n"}}))
    all_right([gateway.ask()], 5)
    expect(load(stage.auth).get("zz-new") == {"type": "api_key", "key": "n"}, "a new entry was lost")
    expect(stage.stored()["refresh"] == stage.claude.refresh_token, "the refresh was not stored")
    data = load(stage.auth)
    del data["zz-new"]
    data["anthropic"]["expires"] = 1
    write_atomic(stage.auth, dump(data))
    stage.claude.before = edit(lambda data: data.update({"anthropic": {"type": "api_key", "key": "sk-mine"}}))
    answer = gateway.ask()
    expect(load(stage.auth)["anthropic"] == {"type": "api_key", "key": "sk-mine"}, "a changed entry was overwritten")
    stage.write()
    stage.claude.before = edit(lambda data: data.pop("anthropic"))
    answer = gateway.ask()
    expect("anthropic" not in load(stage.auth), "a removed log-in came back")
    stage.write()
    return f"kept; with a removed log-in the request got {answer.status}"


@case("short")
def gone_while_waiting(stage: Stage) -> str:
    """Logged out, or renewed by another tool, while the gateway waits for the lock."""
    stage.write()
    gateway, = stage.gateway()
    statuses = []
    for change in ("renewed", "removed"):
        stage.write()
        with ForeignLock(stage.auth):
            waiting = Later(gateway.ask)
            time.sleep(0.5)
            data = load(stage.auth)
            if change == "renewed":
                data["anthropic"] = stage.claude.entry()
            else:
                del data["anthropic"]
            write_in_place(stage.auth, dump(data))
        statuses.append(waiting.get().status)
        expect(waiting.get().seconds < 3, f"{change}: {waiting.get().brief}")
    expect(statuses[0] == 200 and statuses[1] in (401, 404), f"statuses {statuses}")
    counts(stage, 0)
    stage.write()
    return f"no refresh, statuses {statuses}"


# --- Clients and signals ----------------------------------------------------------------------------------------------


@case("short")
def client_leaves(stage: Stage) -> str:
    """The client whose request started a refresh goes away: the refresh is finished and kept."""
    stage.write()
    gateway, = stage.gateway()
    stage.claude.after = lambda: time.sleep(1.5)
    body = json.dumps({"model": rig.MODELS["anthropic"], "messages": [{"role": "user", "content": "ping"}]}).encode()
    with socket.create_connection(("127.0.0.1", gateway.port)) as leaving:
        leaving.sendall(b"POST /v1/chat/completions HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n"
                        b"content-length: %d\r\n\r\n%b" % (len(body), body))
        wait_until(lambda: stage.claude.asked, 10, "no refresh")
    stage.claude.after = None
    seconds = wait_until(lambda: stage.stored()["refresh"] == stage.claude.refresh_token and not
                         os.path.exists(stage.lock), 10, "the refresh was not kept")
    all_right([gateway.ask()], 3)
    counts(stage, 1)
    return f"stored {seconds:.1f} s later"


@case("short")
def stopped_meanwhile(stage: Stage) -> str:
    """SIGTERM in the middle of a refresh: the new token is stored and the lock given back before the end."""
    texts = []
    for wait_s in (1.5,) if IS_SHORT else (1.5, 9.0):
        stage.write()
        gateway, = stage.gateway()
        stage.claude.after = lambda wait_s=wait_s: time.sleep(wait_s)
        before = stage.claude.refreshed
        waiting = Later(gateway.ask)
        wait_until(lambda: stage.claude.refreshed > before, 10, "no refresh")
        gateway.process.send_signal(signal.SIGTERM)
        started = time.monotonic()
        wait_until(lambda: gateway.process.poll() is not None, 30, f"stopping, with a server that took {wait_s} s")
        seconds = time.monotonic() - started
        waiting.get()
        expect(stage.stored()["refresh"] == stage.claude.refresh_token, f"lost, with a server that took {wait_s} s")
        expect(not os.path.exists(stage.lock), "the lock was left behind")
        texts.append(f"{seconds:.1f} s for a server that took {wait_s} s")
    return "ended after " + ", ".join(texts)


@case("slow")
def frozen_and_thawed(stage: Stage) -> str:
    """A gateway frozen in its refresh past the stale limit: it must not remove the next holder's lock, nor undo it."""
    stage.write()
    stage.claude.reuse_s = 300
    first, second = stage.gateway(2)
    reached, is_first = threading.Event(), [True]

    def pause() -> None:
        if is_first[0]:
            is_first[0] = False
            reached.set()
            time.sleep(1.0)

    stage.claude.after = pause
    frozen = Later(first.ask)
    expect(reached.wait(20), "no refresh")
    os.kill(first.pid, signal.SIGSTOP)
    try:
        time.sleep(0.2)
        age(stage.lock, 31)                     # as if half a minute had passed
        answer = second.ask()
        expect(answer.is_right, answer.brief)
        foreign = ForeignLock(stage.auth)
        foreign.acquire()
    finally:
        os.kill(first.pid, signal.SIGCONT)
    late = frozen.get(5) if not frozen.thread.join(3) and not frozen.thread.is_alive() else None
    expect(os.path.isdir(stage.lock), "the thawed gateway removed a lock that was not its own")
    foreign.release()
    late = late or frozen.get(60)
    expect(late.is_right, late.brief)
    expect(stage.stored()["refresh"] == stage.claude.refresh_token, "the stored log-in is dead")
    counts(stage, 1)
    return f"the thawed one answered after {late.seconds:.1f} s"


# --- Odd files and folders --------------------------------------------------------------------------------------------


@case("short")
def symlink(stage: Stage) -> str:
    """auth.json is a symbolic link: it stays one, and both of its locks count."""
    stage.write()
    target = os.path.join(stage.folder, "elsewhere")
    os.mkdir(target, 0o700)
    real = os.path.join(target, "real-auth.json")
    os.rename(stage.auth, real)
    os.symlink("../elsewhere/real-auth.json", stage.auth)
    gateway, = stage.gateway()
    all_right([gateway.ask()], 5)
    expect(os.path.islink(stage.auth) and not os.path.islink(real), "the link was replaced by a file")
    expect(load(real)["anthropic"]["refresh"] == stage.claude.refresh_token, "the target was not changed")
    for path in (stage.auth, real):
        stage.write()
        before = stage.claude.asked
        with ForeignLock(path):
            waiting = Later(gateway.ask)
            time.sleep(0.8)
            expect(stage.claude.asked == before, f"{os.path.basename(path)}.lock was not respected")
        expect(waiting.get().is_right, waiting.get().brief)
    stage.write()
    stage.claude.before = lambda: (expect(os.path.isdir(stage.lock), "no lock beside the link"),
                                   expect(os.path.isdir(real + ".lock"), "no lock beside the target"))
    all_right([gateway.ask()], 5)
    expect(os.listdir(target) == ["real-auth.json"], f"left behind: {os.listdir(target)}")
    expect(not stage.leftovers(), f"left behind: {stage.leftovers()}")
    return "link kept, both locks taken"


@case("short")
def odd_files(stage: Stage) -> str:
    """Byte order mark, line ends, lone surrogates, numbers, nesting: kept or at least not harmed; broken files stay."""
    stage.write()
    gateway, = stage.gateway()
    raw = json.loads(stage.written)

    def refresh(text: bytes, what: str) -> Dict[str, Any]:
        before = stage.claude.refreshed
        with open(stage.auth, "wb") as file:
            file.write(text)
        os.chmod(stage.auth, 0o600)
        answer = gateway.ask()
        expect(answer.is_right, f"{what}: {answer.brief}")
        expect(stage.claude.refreshed == before + 1, f"{what}: {stage.claude.refreshed - before} refreshes")
        data = load(stage.auth)
        expect(data["anthropic"]["refresh"] == stage.claude.refresh_token, f"{what}: not stored")
        expect(not rig.strict(data), f"{what}: {rig.strict(data)}")
        return data

    def text(**extra: Any) -> str:
        raw["anthropic"] = {**raw["anthropic"], **stage.claude.entry(), "expires": 1, **extra}
        return dump(raw)

    refresh(b"\xef\xbb\xbf" + text().encode(), "byte order mark")
    with open(stage.auth, "rb") as file:
        has_mark = file.read(3) == b"\xef\xbb\xbf"
    refresh(text().replace("\n", "\r\n").encode(), "CR LF")
    refresh(json.dumps(json.loads(text())).encode(), "one line, escaped")
    kept = refresh(text(mine={"a": [1, None]}, accountId=None).encode(), "extra fields")["anthropic"]
    expect(kept["mine"] == {"a": [1, None]} and "accountId" in kept, "a field of the refreshed entry was lost")
    raw["zz"] = {"type": "api_key", "key": "HALF"}
    kept = refresh(text().replace('"HALF"', '"\\ud83d half"').encode(), "half a surrogate pair")
    expect(kept["zz"]["key"] == "\ud83d half", "half a surrogate pair was changed")
    del raw["zz"]
    raw["zz"] = {"type": "api_key", "long": 12345678901234567890123, "float": 0.1, "e": 1e300}
    expect(refresh(text().encode(), "numbers")["zz"] == raw["zz"], "numbers were changed")
    del raw["zz"]
    for odd in (0, -1, 1.5, "1700000000000", None, True, 1e300, "absent"):
        entry = text(expires=odd) if odd != "absent" else text()
        if odd == "absent":
            broken = json.loads(entry)
            del broken["anthropic"]["expires"]
            entry = dump(broken)
        with open(stage.auth, "w", encoding="utf-8") as file:
            file.write(entry)
        answer = gateway.ask()
        expect(answer.is_right, f"expires {odd!r}: {answer.brief}")
    texts = []
    for broken in (b"", b"{", b'{"anthropic": ', b"[]", b"null", b"\xff\xfe", b'{"anthropic": 5}',
                   b'{"anthropic": {"type": "oauth"}}'):
        with open(stage.auth, "wb") as file:
            file.write(broken)
        answer = gateway.ask()
        with open(stage.auth, "rb") as file:
            expect(file.read() == broken, f"{broken!r} was overwritten")
        expect(answer.status in (200, 401, 404, 500, 502, 503), answer.brief)
        texts.append(answer.status)
    os.unlink(stage.auth)
    texts.append(gateway.ask().status)
    stage.write()
    all_right([gateway.ask()], 5)
    return f"mark kept: {has_mark}; with broken files: {texts}"


@case("short")
def folder_not_writable(stage: Stage) -> str:
    """A folder that may not be written: said clearly, no refresh token is spent, valid log-ins go on."""
    stage.write()
    os.chmod(stage.auth_dir, 0o555)
    try:
        gateway, = stage.gateway(plain=True)
        answer = gateway.ask()
        again = gateway.ask()
        expect(gateway.ask("openai-codex").is_right, "a valid log-in suffers")
        expect(answer.seconds < 10, f"took {answer.seconds:.1f} s")
        if answer.is_right:
            expect(again.is_right and stage.claude.refreshed == 1, f"then: {again.brief}")
        else:
            expect(stage.claude.refreshed == 0, "a refresh token was spent that cannot be stored")
            expect("auth.json" in answer.text, f"not clear: {answer.brief}")
    finally:
        os.chmod(stage.auth_dir, 0o700)
    return f"{answer.status}, refreshes {stage.claude.refreshed}: {answer.text[:170]}"


def disk_full(stage: Stage, hook: Dict[str, str]) -> str:
    stage.write()
    flag = os.path.join(stage.folder, "flag")
    gateway, = stage.gateway(hook={"RIG_FLAG": flag, **hook})
    answers = [gateway.ask() for _ in range(3)]
    expect(gateway.ask("openai-codex").is_right, "a valid log-in suffers")
    with open(stage.auth, encoding="utf-8") as file:
        expect(file.read() == stage.written, "auth.json was damaged")
    expect(not stage.leftovers(), f"left behind: {stage.leftovers()}")
    expect(not os.path.exists(stage.lock), "the lock was left behind")
    if stage.claude.refreshed:
        expect(all(answer.is_right for answer in answers), f"the new token was lost: {answers[-1].brief}")
        expect(stage.claude.refreshed == 1, f"{stage.claude.refreshed} refreshes, none stored")
    else:
        expect("auth.json" in answers[0].text, f"not clear: {answers[0].brief}")
    return f"statuses {[answer.status for answer in answers]}, refreshes {stage.claude.refreshed}"


@case("long")
def disk_full_at_write(stage: Stage) -> str:
    """No room for the new file (a limit on file sizes stands for the full disk)."""
    return disk_full(stage, {"RIG_LIMIT": "100"})


@case("short")
def disk_full_at_replace(stage: Stage) -> str:
    """The new file cannot take its place; when it can again, the log-in that was kept in memory is stored."""
    return disk_full(stage, {"RIG_AT": "replace", "RIG_DO": "ENOSPC"})


@case("long")
def disk_full_for_real(stage: Stage) -> str:
    """A full file system, where one can be mounted; when there is room again, the log-in is stored."""
    stage.write()
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=16k,mode=0700", "none", stage.auth_dir],
                          stderr=subprocess.DEVNULL, check=False)
    if done.returncode:
        return "skipped: no mount here"
    try:
        write_atomic(stage.auth, stage.written)
        filler = os.path.join(stage.auth_dir, "filler")
        gateway, = stage.gateway()

        def fill() -> None:
            with open(filler, "wb", buffering=0) as file:
                try:
                    while True:
                        file.write(b"x" * 4096)
                except OSError:
                    pass

        stage.claude.before = fill              # the disk fills up while the refresh is under way
        answers = [gateway.ask() for _ in range(3)]
        with open(stage.auth, encoding="utf-8") as file:
            expect(file.read() == stage.written, "auth.json was damaged")
        expect(all(answer.is_right for answer in answers), f"the new token was lost: {answers[-1].brief}")
        expect(stage.claude.refreshed == 1, f"{stage.claude.refreshed} refreshes")
        os.unlink(filler)
        seconds = wait_until(lambda: stage.stored()["refresh"] == stage.claude.refresh_token, 30,
                             "not stored when there was room again")
        expect(not stage.leftovers(), f"left behind: {stage.leftovers()}")
        stage.check_file()
        gateway.stop()
        return f"served from memory, stored {seconds:.1f} s after there was room"
    finally:
        subprocess.run(["umount", stage.auth_dir], check=False)
        stage.write()


@case("long")
def bind_mounted_file(stage: Stage) -> str:
    """auth.json is a mount point, as containers have it: it cannot be replaced, yet a renewed log-in has to be kept."""
    stage.write()
    real = os.path.join(stage.folder, "on-the-host.json")
    write_atomic(real, stage.written)
    if subprocess.run(["mount", "--bind", real, stage.auth], stderr=subprocess.DEVNULL, check=False).returncode:
        return "skipped: no mount here"
    try:
        gateway, = stage.gateway()
        answers = [gateway.ask() for _ in range(3)]
        all_right(answers, 5)
        expect(stage.claude.refreshed == 1, f"{stage.claude.refreshed} refreshes")
        expect(stage.stored()["refresh"] == stage.claude.refresh_token,
               "the refresh token was spent, the new one is only in memory and lost with the process")
        stage.check_file()
        return "kept"
    finally:
        subprocess.run(["umount", stage.auth], check=False)


@case("long")
def no_regular_file(stage: Stage) -> str:
    """auth.json is a pipe or a folder: nothing hangs, and it is said."""
    statuses = []
    for make in (os.mkfifo, os.mkdir):
        with_file = os.path.exists(stage.auth) and not os.path.isdir(stage.auth)
        if with_file:
            os.unlink(stage.auth)
        make(stage.auth)
        gateway, = stage.gateway()
        answer = gateway.ask(timeout_s=20)
        expect(answer.status in (401, 404, 500) and answer.seconds < 5, answer.brief)
        statuses.append(answer.status)
    os.rmdir(stage.auth)
    stage.write()
    return f"statuses {statuses}"


@case("short")
def logout_command(stage: Stage) -> str:
    """The logout command waits for the lock, removes that entry and nothing else; a running gateway notices."""
    stage.write(claude_s=1000)
    gateway, = stage.gateway()
    all_right([gateway.ask()], 5)
    command = [stage.python, stage.program, "logout", "anthropic", "--auth-dir", stage.auth_dir]
    environ = {"HOME": stage.folder, "PATH": os.environ.get("PATH", ""), "PYTHONDONTWRITEBYTECODE": "1"}
    with ForeignLock(stage.auth):
        process = subprocess.Popen(command, env=environ, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
                                   stderr=subprocess.STDOUT)
        time.sleep(1.0)
        expect(process.poll() is None and stage.stored(), "it did not wait for the lock")
    out = process.communicate(timeout=20)[0].decode()
    expect(process.returncode == 0, f"status {process.returncode}: {out[-300:]}")
    expect(not rig.LEAK.search(out), "a token in its output")
    with open(stage.auth, encoding="utf-8") as file:
        after = slices(file.read())
    before = slices(stage.written)
    del before["anthropic"]
    expect(after == before, "more than that entry was changed")
    expect(mode_of(stage.auth) == "0o600", mode_of(stage.auth))
    answer = gateway.ask()
    expect(answer.status in (401, 404), answer.brief)
    stage.write()
    return f"then {answer.status}: {out.strip()[:120]}"


@case("slow")
def lock_is_a_file(stage: Stage) -> str:
    """auth.json.lock is no directory, or not empty: said clearly in the end, valid log-ins go on."""
    stage.write()
    gateways = stage.gateway(2)
    texts = []
    for kind in ("file", "not empty"):
        if kind == "file":
            with open(stage.lock, "w"):
                pass
        else:
            os.mkdir(stage.lock)
            with open(os.path.join(stage.lock, "x"), "w"):
                pass
        waiting = [Later(gateway.ask) for gateway in gateways]
        time.sleep(0.5)
        age(stage.lock, 27)
        all_right([gateway.ask("openai-codex") for gateway in gateways], 2)
        for later in waiting:
            answer = later.get()
            expect(answer.seconds < 60, answer.brief)
            expect(answer.is_right or "auth.json" in answer.text, f"not clear: {answer.brief}")
        texts.append(f"{kind}: {answer.status} after {answer.seconds:.0f} s")
        subprocess.run(["rm", "-rf", stage.lock], check=True)
        stage.write()
        for gateway in gateways:
            gateway.stop()
        gateways = stage.gateway(2)
    all_right([gateway.ask() for gateway in gateways], 5)
    return "; ".join(texts)


@case("long")
def no_file_yet(stage: Stage) -> str:
    """No folder and no file: the gateway runs, makes neither by reading, and takes up a log-in made later."""
    os.rmdir(stage.auth_dir)
    gateway, = stage.gateway()
    answer = gateway.ask()
    expect(answer.status in (401, 404), answer.brief)
    made = os.path.exists(stage.auth_dir)
    os.makedirs(stage.auth_dir, mode=0o700, exist_ok=True)
    stage.write()
    all_right([gateway.ask()], 5)
    counts(stage, 1)
    return f"{answer.status}; folder made by reading: {made}"


# --- Running them -----------------------------------------------------------------------------------------------------


def run(program: str, names: List[str], short: bool, pi: Optional[rig.Pi], python: str = "",
        limit_s: float = 1e9, jobs: int = 1) -> Tuple[int, int]:
    """(tests run, tests failed); those that do not fit into the time are left out."""
    global IS_SHORT
    IS_SHORT = short
    names = names or [name for name, (_, kind) in CASES.items() if kind == "short" or not short]
    chosen = [(name, CASES[name][0]) for name in names]
    started, results = time.monotonic(), []

    def one(name: str, function: Callable[..., str]) -> None:
        if time.monotonic() - started > limit_s:
            results.append(None)
            return
        begun = time.monotonic()
        try:
            with rig.staged(program, python, pi if not short else None) as stage:
                text = function(stage)
                skipped = text.startswith("skipped")
                if not skipped:
                    stage.check_file()
                    stage.check_logs()
            results.append(True)
            word = "skip" if skipped else "ok"
        except Exception as error:
            results.append(False)
            word, text = "FAIL", str(error) if isinstance(error, Failed) else traceback.format_exc()
        print(f"{word:6}{name:34}{time.monotonic() - begun:6.1f} s  {rig.LEAK.sub('<TOKEN>', text)}", flush=True)

    rig.Stage.make_certificates()
    with concurrent.futures.ThreadPoolExecutor(jobs) as pool:
        list(pool.map(lambda item: one(*item), chosen))
    if None in results:
        print(f"left out for want of time: {results.count(None)} of {len(results)}")
    return len(results) - results.count(None), results.count(False)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("program", help="path of pigateway.py")
    parser.add_argument("--short", action="store_true")
    parser.add_argument("--jobs", type=int, default=1, help="so many at a time")
    parser.add_argument("--only", default="", help="names of tests: " + ", ".join(CASES))
    parser.add_argument("--python", default="", help="the Python that runs the gateways")
    parser.add_argument("--pi", default="", help="folder that has pi in its node_modules")
    parser.add_argument("--node", default="")
    options = parser.parse_args()
    pi, why = rig.find_pi(options.node, options.pi)
    if not pi:
        print("without pi's strict reader:", why)
    names = [name for name in options.only.split(",") if name]
    unknown = [name for name in names if name not in CASES]
    if unknown:
        parser.error(f"no test {unknown[0]}")
    try:
        done, failed = run(options.program, names, options.short, pi, options.python, jobs=options.jobs)
    finally:
        rig.remove_certificates()
    print(f"{done} tests, {failed} failed")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
