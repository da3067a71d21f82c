"""A short run of stress.py and kill9.py, for every change: python ci.py pigateway.py [--seconds 20] [--pi FOLDER] ...

A part of the time goes to three gateways (and pi, where there is one) on one auth.json, the rest to accidents, as many
as there is time for. Without node or pi's package, the part with pi is left out and said to be. Exit status 0 when all
was kept, else 1.
"""
import argparse
import sys
import time

import kill9
import rig
import stress

FIRST = [
    "slow-server-keeps-the-lock-fresh", "killed-before-rotation", "killed-in-write-before-replace",
    "stale-lock-race", "rotated-without-a-lock", "edited-meanwhile", "stopped-meanwhile", "client-leaves",
    "log-in-is-over", "symlink", "echoed-tokens", "disk-full-at-replace", "folder-not-writable", "gone-while-waiting",
    "fifty-on-four", "logout-command", "redirected", "odd-files", "fifty-at-expiry", "dead-foreign-holder",
    "killed-after-rotation", "killed-in-write-after-replace", "ahead-of-expiry", "server-is-down", "one-provider-hangs"]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("program", help="path of pigateway.py")
    parser.add_argument("--seconds", type=float, default=20.0, help="how long it may take, more or less")
    parser.add_argument("--python", default="", help="the Python that runs the gateways")
    parser.add_argument("--pi", default="", help="folder that has pi in its node_modules")
    parser.add_argument("--node", default="")
    options = parser.parse_args()
    started = time.monotonic()
    pi, why = rig.find_pi(options.node, options.pi)
    if not pi:
        print("the part with pi is left out:", why, flush=True)
    status = 0
    try:
        name = "gateways and pi" if pi else "gateways alone"
        try:
            figures = stress.run(options.program, max(options.seconds / 4, 3.0), pi, 8.0, 3, options.python, quiet=True)
            print(f"ok    {name}: {figures['requests']} requests, {figures['refreshes']} refreshes, "
                  f"{figures['lock-free reads']} lock-free reads, {figures['counts of the third tool']} writes by a "
                  "third tool; nothing refused, nothing lost", flush=True)
        except rig.Failed as error:
            print(f"FAIL  {name}: {error}", flush=True)
            status = 1
        left = max(options.seconds - (time.monotonic() - started), options.seconds / 3)
        done, failed = kill9.run(options.program, FIRST, True, pi, options.python, left, 3)
    finally:
        rig.remove_certificates()
    print(f"{done} accidents, {failed} failed; {time.monotonic() - started:.0f} s")
    return 1 if failed or status else 0


if __name__ == "__main__":
    sys.exit(main())
