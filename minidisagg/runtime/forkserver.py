"""Workers are forked from one process that has imported what they need: 0.1 s for each start and restart, not three.

    front end ──config, log, pipe──▶ fork server ──fork──▶ worker
              ◀───── pid, then exit code, through the pipe: it is the parent, and has waited for it

The fork server never computes: no thread and no CUDA context is forked. It ends when the front end's end of its socket
does, and the kernel ends its workers with it. What has to be set before a process begins (the tunables of malloc) is
its environment; front ends of one process and one environment share it.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import os
import select
import signal
import socket
import struct
import subprocess
import sys
import threading
import traceback
from collections.abc import Callable, Mapping
from typing import NoReturn

_LENGTH = struct.Struct("<I")
_lock = threading.Lock()
_servers: dict[frozenset[tuple[str, str]], ForkServer] = {}


class Child:
    """A worker's process. `returncode` as in `subprocess`: None while it runs, negative after a signal."""

    def __init__(self, pid: int, report: asyncio.StreamReader, pipe: asyncio.BaseTransport) -> None:
        self.pid = pid
        self.returncode: int | None = None
        self._pipe = pipe  # closed, it ends the worker
        self._end = asyncio.ensure_future(self._wait(report))

    async def wait(self) -> int:
        """The exit code, once the process is dead."""
        return await asyncio.shield(self._end)

    def send_signal(self, number: signal.Signals) -> None:
        """Nothing happens to a dead process."""
        if self.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, number)

    def kill(self) -> None:
        """SIGKILL."""
        self.send_signal(signal.SIGKILL)

    async def _wait(self, report: asyncio.StreamReader) -> int:
        # The worker holds the pipe as well: its end without a word means that both are dead.
        self.returncode = int(await report.readline() or -signal.SIGKILL)
        self._pipe.close()
        return self.returncode


class ForkServer:
    """The front end's side. Made by `fork_server`."""

    def __init__(self, environment: Mapping[str, str]) -> None:
        self.users = 0
        self._socket, theirs = socket.socketpair()
        self._sending = threading.Lock()  # front ends may live on loops of their own
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "minidisagg.runtime.forkserver", str(theirs.fileno())],
                stdin=subprocess.DEVNULL,
                env=environment,
                pass_fds=[theirs.fileno()],
            )

    @property
    def alive(self) -> bool:
        """As far as is known."""
        return self._process.poll() is None

    async def fork(self, config: str, log: int) -> Child:
        """A worker with this `WorkerConfig` (JSON), that writes to the descriptor `log`. Raises `OSError`."""
        reading, writing = os.pipe()
        report = asyncio.StreamReader()
        pipe, _ = await asyncio.get_running_loop().connect_read_pipe(
            lambda: asyncio.StreamReaderProtocol(report), os.fdopen(reading, "rb")
        )
        try:
            data = config.encode()
            try:
                with self._sending:
                    socket.send_fds(self._socket, [_LENGTH.pack(len(data))], [log, writing])
                    self._socket.sendall(data)
            finally:
                os.close(writing)
            answer = (await report.readline()).decode().strip()
            if not answer.isdecimal():
                raise OSError(answer or "the process that workers are forked from has died")
        except BaseException:
            pipe.close()  # the fork server kills those whom nobody waits for
            raise
        return Child(int(answer), report, pipe)

    def release(self) -> None:
        """One user fewer; without any it ends."""
        with _lock:
            self.users -= 1
            if not self.users:
                for key in [key for key, server in _servers.items() if server is self]:
                    del _servers[key]
                self._socket.close()
                self._process.kill()  # it may still import
                self._process.wait()


def fork_server(environment: Mapping[str, str]) -> ForkServer:
    """The one of this environment, started where there is none. To be released."""
    key = frozenset(environment.items())
    with _lock:
        if key not in _servers or not _servers[key].alive:
            _servers[key] = ForkServer(environment)
        _servers[key].users += 1
        return _servers[key]


# ---------------------------------------------------------------- its own process


def main() -> None:
    """`python -m minidisagg.runtime.forkserver DESCRIPTOR`: a socket, over which each worker's description comes."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the front end's to handle
    from minidisagg.runtime import process  # takes seconds; the front end, which imports this module, has no use for it

    gc.freeze()  # else the first collection of each worker would copy every page
    requests = socket.socket(fileno=int(sys.argv[1]))
    woken, wake = os.pipe()
    os.set_blocking(wake, False)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    signal.set_wakeup_fd(wake, warn_on_full_buffer=False)
    server = os.getpid()
    reports: dict[int, int] = {}  # pid → the pipe on which the front end waits
    ready = select.poll()
    for descriptor in requests.fileno(), woken:
        ready.register(descriptor, select.POLLIN)
    while True:
        (descriptor, _), *_ = ready.poll()
        if descriptor == woken:
            os.read(woken, 4096)
            while reports and (died := os.waitpid(-1, os.WNOHANG))[0]:
                pipe = reports.pop(died[0])
                _tell(pipe, str(os.waitstatus_to_exitcode(died[1])))
                with contextlib.suppress(KeyError):
                    ready.unregister(pipe)
                os.close(pipe)
        elif descriptor != requests.fileno():  # nobody waits any more
            ready.unregister(descriptor)
            os.kill(next(pid for pid, pipe in reports.items() if pipe == descriptor), signal.SIGKILL)
        else:
            head, descriptors, _, _ = socket.recv_fds(requests, _LENGTH.size, 2)
            if not head:
                return
            log, pipe = descriptors
            (length,) = _LENGTH.unpack(head)
            config = requests.recv(length, socket.MSG_WAITALL).decode()
            try:
                pid = os.fork()
            except OSError as error:  # no memory or no process number to be had
                _tell(pipe, str(error))
                os.close(pipe)
            else:
                if not pid:
                    for other in requests.detach(), woken, wake, *reports.values():
                        os.close(other)
                    _become_worker(process.main, config, log, server)
                _tell(pipe, str(pid))
                reports[pid] = pipe
                ready.register(pipe, 0)  # tells when its other end is closed
            os.close(log)


def _tell(pipe: int, line: str) -> None:
    with contextlib.suppress(BrokenPipeError):
        os.write(pipe, line.encode() + b"\n")


def _become_worker(work: Callable[[str, int], NoReturn], config: str, log: int, parent: int) -> NoReturn:
    try:
        signal.set_wakeup_fd(-1)
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        os.dup2(log, 1)
        os.dup2(log, 2)
        os.close(log)
        work(config, parent)
    except BaseException:
        traceback.print_exc()
    os._exit(1)


if __name__ == "__main__":
    main()
