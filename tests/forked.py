"""The program in a process of its own, without the two seconds in which Python and torch start.

    with forked.Popen(["sample", "a"], cwd=folder, stdout=PIPE, text=True) as process:     # lm sample a
        ...
    done = forked.run(["list"], cwd=folder, capture_output=True, text=True)

They take what `subprocess.Popen` and `subprocess.run` take. A process that has imported the program and has run nothing
of it forks itself for each. What Python or torch read from the environment when they start makes a process of the
usual kind. So does a system without fork and pidfd.

What is tested of the start itself needs `sys.executable -m cli.main`.
"""

from __future__ import annotations

import atexit
import contextlib
import functools
import gc
import importlib
import io
import json
import os
import random
import re
import selectors
import socket
import struct
import subprocess
import sys
import threading
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
IMPORTED = (
    "torch", "lm.jobs.train", "lm.jobs.sweep", "lm.generation.open_decoder", "lm.evaluation.perplexity", "cli.program",
    "cli.output", "serve.app", "serve.program",
)  # fmt: skip
READ_AT_START = re.compile("PYTHON|OMP_|MKL_|GOMP_|KMP_|OPENBLAS_|TORCH|LC_|LANG|TZ$|RANK$|WORLD_SIZE$|LD_|HF_|GRADIO_")
"""Names of environment variables that a fork would not see."""
MESSAGE_BYTES = 1 << 18
_LOCK = threading.Lock()
_STATUS = struct.Struct("i")


class Popen(subprocess.Popen[Any]):
    """`lm` with these arguments.

    Args:
        arguments: of the program.
        strict: every warning is an error.
        imported: modules that the process which forks has imported too.
        options: as for `subprocess.Popen`.
    """

    def __init__(
        self, arguments: Sequence[str], *, strict: bool = False, imported: tuple[str, ...] = (), **options: Any
    ) -> None:
        environment = {"PYTHONPATH": str(ROOT), **(options.get("env") or os.environ)}
        self._strict, self._imported, self._arguments, self._status = strict, imported, list(arguments), -1
        special = options.keys() & {"preexec_fn", "pass_fds", "start_new_session"}
        self._forks = not special and _can_fork(environment)
        flags = ["-W", "error"] if strict else []
        super().__init__([sys.executable, *flags, "-m", "cli.main", *arguments], **{**options, "env": environment})

    def _execute_child(self, *given: Any) -> None:
        if not self._forks:
            super()._execute_child(*given)  # type: ignore[misc]
            return
        cwd, env = given[5], given[6]
        read, _, _, write, _, error = pipes = given[10:16]
        task = {"arguments": self._arguments, "cwd": str(cwd or os.getcwd()), "env": env, "strict": self._strict}
        self._status, status = os.pipe()
        try:
            streams = [own if given_one == -1 else given_one for own, given_one in enumerate((read, write, error))]
            with _LOCK:
                channel = _forking_process(self._imported)
                socket.send_fds(channel, [json.dumps(task).encode()], [*streams, status])
                self.pid = _STATUS.unpack(channel.recv(_STATUS.size))[0]
            self._child_created = True
        finally:
            os.close(status)
        self._close_pipe_fds(*pipes)  # type: ignore[attr-defined]

    def _try_wait(self, wait_flags: int) -> tuple[int, int]:
        if not self._forks:
            return super()._try_wait(wait_flags)  # type: ignore[misc,no-any-return]
        os.set_blocking(self._status, not wait_flags & os.WNOHANG)
        try:
            content = os.read(self._status, _STATUS.size)
        except BlockingIOError:
            return 0, 0
        os.close(self._status)
        return self.pid, _STATUS.unpack(content)[0]

    def _internal_poll(self, *given: Any, **more: Any) -> int | None:
        if not self._forks:
            return super()._internal_poll(*given, **more)  # type: ignore[misc,no-any-return]
        if self.returncode is None and self._waitpid_lock.acquire(False):  # type: ignore[attr-defined]
            with contextlib.ExitStack() as locked:
                locked.callback(self._waitpid_lock.release)  # type: ignore[attr-defined]
                pid, status = self._try_wait(os.WNOHANG)
                if pid:
                    self._handle_exitstatus(status)  # type: ignore[attr-defined]
        return self.returncode


def run(
    arguments: Sequence[str],
    *,
    input: Any = None,  # noqa: A002
    timeout: float | None = None,
    capture_output: bool = False,
    check: bool = False,
    **options: Any,
) -> subprocess.CompletedProcess[Any]:
    """As `subprocess.run`, for `lm` with these arguments."""
    if capture_output:
        options |= {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    if input is not None:
        options["stdin"] = subprocess.PIPE
    with Popen(arguments, **options) as process:
        try:
            out, err = process.communicate(input, timeout)
        except BaseException:
            process.kill()
            raise
    done = subprocess.CompletedProcess(process.args, process.returncode, out, err)
    if check:
        done.check_returncode()
    return done


def _can_fork(environment: dict[str, str]) -> bool:
    if not hasattr(os, "pidfd_open") or not hasattr(socket, "SOCK_SEQPACKET"):
        return False
    return not any(READ_AT_START.match(name) for name, _ in environment.items() ^ _usual_environment().items())


@functools.cache
def _usual_environment() -> dict[str, str]:
    """The environment of the processes that fork."""
    return {"PYTHONPATH": str(ROOT), **os.environ}


@functools.cache
def _forking_process(imported: tuple[str, ...]) -> socket.socket:
    """The connection to a process that forks and has imported these modules too."""
    own, its = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with its:
        process = subprocess.Popen(
            [sys.executable, "-m", "tests.forked", str(its.fileno()), *imported], cwd=ROOT, pass_fds=[its.fileno()],
            env=_usual_environment(), stdin=subprocess.DEVNULL, start_new_session=True,
        )  # fmt: skip

    def end() -> None:
        own.close()
        process.wait()

    atexit.register(end)
    return own


# -- the process that forks ---------------------------------------------------------------------------


def _next_task(channel: socket.socket) -> dict[str, Any] | None:
    """In a fork: what it has to do. In the process that forks: None, at the end of the session."""
    with selectors.DefaultSelector() as selector:
        selector.register(channel, selectors.EVENT_READ)
        while True:
            for key, _ in selector.select():
                if key.data is not None:
                    _report_end(selector, key.fd, *key.data)
                    continue
                content, files, _, _ = socket.recv_fds(channel, MESSAGE_BYTES, 4)
                if not content:
                    return None
                *streams, status = files
                if (pid := os.fork()) == 0:
                    for other in selector.get_map().values():
                        if other.data is not None:
                            os.close(other.fd)
                            os.close(other.data[1])
                    channel.close()
                    os.close(status)
                    _take_streams(streams)
                    return dict(json.loads(content))
                for file in streams:
                    os.close(file)
                selector.register(os.pidfd_open(pid), selectors.EVENT_READ, (pid, status))
                channel.send(_STATUS.pack(pid))


def _report_end(selector: selectors.BaseSelector, pidfd: int, pid: int, status: int) -> None:
    selector.unregister(pidfd)
    os.close(pidfd)
    _, code = os.waitpid(pid, 0)
    # Nobody may wait for it any more.
    with contextlib.suppress(BrokenPipeError):
        os.write(status, _STATUS.pack(code))
    os.close(status)


def _take_streams(streams: Sequence[int]) -> None:
    """Make the files stdin, stdout and stderr."""
    for number, file in enumerate(streams):
        os.dup2(file, number)
    for file in streams:
        os.close(file)
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        usual, raw = getattr(sys, name), open(number, "wb" if number else "rb", closefd=False)  # noqa: SIM115
        stream = io.TextIOWrapper(
            raw, usual.encoding, usual.errors, line_buffering=number == 2 or (number == 1 and raw.isatty())
        )
        setattr(sys, name, stream)
        setattr(sys, f"__{name}__", stream)


def _become(task: dict[str, Any], set_by_imports: dict[str, str]) -> None:
    """Take over the folder, environment and arguments of a task, as if Python had started with them."""
    os.chdir(task["cwd"])
    os.environ.clear()
    os.environ.update({**set_by_imports, **task["env"]})
    sys.argv = [str(ROOT / "cli" / "main.py"), *task["arguments"]]
    random.seed()
    if numpy := sys.modules.get("numpy"):
        numpy.random.seed()
    if task["strict"]:
        sys.warnoptions[:] = ["error"]
        warnings.resetwarnings()
        warnings.simplefilter("error")


def _leave(result: dict[str, int]) -> None:
    """Exit without the interpreter's last steps, which take longer than most programs: they free all that was imported.

    It is the last function that is called at an exit, because it is the first that was registered.
    """
    if "exit code" in result:
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(OSError):
                stream.flush()
        os._exit(result["exit code"])


if __name__ == "__main__":
    outcome: dict[str, int] = {}
    atexit.register(_leave, outcome)
    given = dict(os.environ)
    for module in (*IMPORTED, *sys.argv[2:]):
        importlib.import_module(module)
    added = {name: value for name, value in os.environ.items() if name not in given}
    # No fork looks at these objects to free memory.
    gc.collect()
    gc.freeze()
    if (wanted := _next_task(socket.socket(fileno=int(sys.argv[1])))) is not None:
        _become(wanted, added)
        from cli.main import main

        outcome["exit code"] = 1
        try:
            main()
        except SystemExit as ended:
            outcome["exit code"] = ended.code if isinstance(ended.code, int) else int(ended.code is not None)
            raise
        outcome["exit code"] = 0
