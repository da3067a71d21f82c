"""Runs a program with a pause, or an error, at a chosen moment of its file writing: python hook.py PROGRAM ARGUMENTS...

RIG_AT     replace (before the new file takes its place), replaced (after), write (half of the text is written)
RIG_DO     pause (a file named RIG_FLAG appears, then a minute passes) or an errno name such as ENOSPC
RIG_LIMIT  instead: files may not become larger than so many bytes
The file is auth.json, or whatever is written beside it under a name that starts so.
"""
import errno
import os
import runpy
import sys
import time


def act(path):
    with open(os.environ["RIG_FLAG"], "w") as file:
        file.write(path)
    what = os.environ.get("RIG_DO", "pause")
    if what != "pause":
        raise OSError(getattr(errno, what), os.strerror(getattr(errno, what)), path)
    time.sleep(60)


def is_ours(path):
    return os.path.basename(os.fsdecode(path)).lstrip(".").startswith(("auth.json", "tmp")) \
        and os.path.basename(os.fsdecode(path)) != "auth.json.lock"


moment = os.environ.get("RIG_AT")
if moment in ("replace", "replaced"):
    for name in ("replace", "rename"):
        def change(source, target, *arguments, _real=getattr(os, name), **options):
            if os.path.basename(os.fsdecode(target)) != "auth.json":
                return _real(source, target, *arguments, **options)
            if moment == "replace":
                act(source)
            _real(source, target, *arguments, **options)
            if moment == "replaced":
                act(target)
        setattr(os, name, change)
elif moment == "write":
    real_open, real_write, watched = os.open, os.write, {}

    def open_file(path, flags, *arguments, **options):
        descriptor = real_open(path, flags, *arguments, **options)
        if flags & (os.O_WRONLY | os.O_RDWR) and isinstance(path, (str, bytes)) and is_ours(path):
            watched[descriptor] = path
            if os.environ.get("RIG_DO", "pause") == "pause":
                real_write(descriptor, b'{\n  "anthropic": {')
            act(path)
        return descriptor

    os.open = open_file
    import builtins
    import io
    real_builtin = builtins.open

    def open_any(file, mode="r", *arguments, **options):
        opened = real_builtin(file, mode, *arguments, **options)
        if isinstance(file, (str, bytes, os.PathLike)) and set(mode) & set("wax+") and is_ours(file):
            opened.write(b'{\n  "anthropic": {' if "b" in mode else '{\n  "anthropic": {')
            opened.flush()
            act(file)
        return opened

    builtins.open = io.open = open_any
if os.environ.get("RIG_LIMIT"):
    import resource
    import signal
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    size = int(os.environ["RIG_LIMIT"])
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))
sys.argv = sys.argv[1:]
sys.path[0] = os.path.dirname(os.path.abspath(sys.argv[0]))
runpy.run_path(sys.argv[0], run_name="__main__")
