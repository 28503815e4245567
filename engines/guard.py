"""The guard: a small process between the supervisor and one engine. No process of an engine outlives it.

Run as `python -I -S guard.py` in a session of its own; standard library only, since it runs in isolation.

In:   one JSON line on stdin (see `Order`), after which stdin stays open as the lifeline: its end means that
      the supervisor is gone. The environment is the engine's.
Out:  the process id of the engine's API server on stdout, one line. All that the engine prints goes to the log.
Ends: with the API server's own exit status (128 + n for signal n), once no descendant is left.

    SIGTERM            SIGTERM to the API server, after the grace SIGKILL to the whole tree
    SIGINT             SIGKILL to the whole tree at once
    end of stdin       like SIGTERM, with the shorter `orphan_grace`
    API server exits   SIGKILL to whatever is left of the tree

As a child subreaper the guard becomes the parent of every orphan of the engine, so that a walk over the
parents in /proc finds them all, whatever session or process group they moved to.
"""

import contextlib
import ctypes
import json
import os
import select
import signal
import sys
import time
from pathlib import Path
from typing import NamedTuple

BANNER = b"==== polyvox: engine starts "
NOT_STARTED = 127

_PR_SET_CHILD_SUBREAPER = 36
_TICK = 1.0


class Order(NamedTuple):
    """What to run. Times are seconds; log_bytes bounds one log file, log_files counts the old ones kept.

    socket: path of the engine's unix socket, removed before it starts and after it ends. parent: the
    supervisor's process id.
    """

    argv: list[str]
    log: str
    parent: int
    socket: str | None = None
    grace: float = 10.0
    orphan_grace: float = 2.0
    log_bytes: int = 10 * 1024 * 1024
    log_files: int = 3


class ProcessRow(NamedTuple):
    """One line of the process table; state is the letter of /proc/PID/stat, such as Z for a zombie."""

    state: str
    parent: int
    session: int


def process_table() -> dict[int, ProcessRow]:
    """Return all processes by id. One that ends meanwhile is left out."""
    rows = {}
    for name in filter(str.isdigit, os.listdir("/proc")):
        with contextlib.suppress(OSError):
            rows[int(name)] = _row(Path("/proc", name, "stat").read_text(errors="replace"))
    return rows


def _row(stat: str) -> ProcessRow:
    # The command name, in parentheses, may itself hold spaces and parentheses.
    state, parent, _group, session = stat.rpartition(")")[2].split()[:4]
    return ProcessRow(state, int(parent), int(session))


def descendants(root: int, table: dict[int, ProcessRow]) -> list[int]:
    """Return the ids of all children of `root`, and of theirs, and so on; not `root` itself."""
    children: dict[int, list[int]] = {}
    for pid, row in table.items():
        children.setdefault(row.parent, []).append(pid)
    found, front = [], [root]
    while front:
        front = [child for pid in front for child in children.get(pid, [])]
        found += front
    return found


def become_subreaper() -> None:
    """Make this process the one that orphans among its descendants are handed to, instead of init."""
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0) != 0:
        error = ctypes.get_errno()
        raise OSError(error, f"prctl(PR_SET_CHILD_SUBREAPER): {os.strerror(error)}")


def send(pid: int, number: int) -> None:
    """Send a signal to a process that may be gone already."""
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, number)


class RotatingLog:
    """A log bounded in size: FILE, FILE.1, ... FILE.n, rotated between lines. Never fails: an engine must
    not stop because a disk is full."""

    def __init__(self, path: str, limit: int, keep: int) -> None:
        # Mutable: the open file and its size.
        self._path, self._limit, self._keep = path, limit, keep
        self._file = -1
        self._size = 0

    def __repr__(self) -> str:
        return f"RotatingLog({self._path!r}, {self._size} of {self._limit} bytes)"

    def write(self, data: bytes) -> None:
        with contextlib.suppress(OSError):
            if self._file < 0:
                self._open()
            while self._size + len(data) > self._limit:
                cut = self._cut(data)
                self._append(data[:cut])
                data = data[cut:]
                self._rotate()
            self._append(data)

    def _cut(self, data: bytes) -> int:
        """Return how many bytes still go into this file: whole lines; one that no file can hold gets its own."""
        cut = data.rfind(b"\n", 0, max(self._limit - self._size, 0)) + 1
        return cut if cut or self._size else data.find(b"\n") + 1 or len(data)

    def _open(self) -> None:
        self._file = os.open(self._path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
        self._size = os.fstat(self._file).st_size

    def _append(self, data: bytes) -> None:
        while data:
            written = os.write(self._file, data)
            self._size += written
            data = data[written:]

    def _rotate(self) -> None:
        os.close(self._file)
        self._file = -1
        for number in range(self._keep - 1, 0, -1):
            with contextlib.suppress(FileNotFoundError):
                os.replace(f"{self._path}.{number}", f"{self._path}.{number + 1}")
        if self._keep:
            os.replace(self._path, f"{self._path}.1")
        else:
            os.unlink(self._path)
        self._open()


class Guard:
    """Runs one engine to its end."""

    def __init__(self, order: Order) -> None:
        # Mutable: the API server's id and exit status, and the moment when patience ends.
        self._order = order
        self._log = RotatingLog(order.log, order.log_bytes, order.log_files)
        self._server = -1
        self._status: int | None = None
        self._deadline: float | None = None
        self._output, self._engine_end = os.pipe()
        self._signals = _signal_pipe()
        self._poll = select.poll()

    def __repr__(self) -> str:
        return f"Guard(server={self._server}, status={self._status}, deadline={self._deadline})"

    def run(self) -> int:
        """Start the engine, return its exit status when nothing of it is left."""
        os.set_blocking(self._output, False)
        for fd in (sys.stdin.fileno(), self._output, self._signals):
            self._poll.register(fd, select.POLLIN)
        self._remove_socket()
        try:
            if not self._start():
                return NOT_STARTED
            while self._status is None:
                self._attend()
        finally:
            self._end_tree()
            self._copy_rest()
            self._remove_socket()
        return self._status

    def _start(self) -> bool:
        argv = self._order.argv
        self._log.write(BANNER + time.strftime("%Y-%m-%d %H:%M:%S ====\n").encode())
        try:
            self._server = _spawn(argv, self._engine_end)
        except OSError as error:
            self._log.write(f"cannot run {argv[0]}: {error.strerror}\n".encode())
            return False
        finally:
            os.close(self._engine_end)
        with contextlib.suppress(OSError):
            os.write(sys.stdout.fileno(), b"%d\n" % self._server)
        return True

    def _attend(self) -> None:
        """Wait for news and act on it: output, signals, the lifeline, the deadline."""
        for fd, _ in self._poll.poll(1000 * self._patience()):
            if fd == self._output:
                self._copy_some()
            elif fd == self._signals:
                self._take_signals()
            elif not os.read(fd, 4096):
                self._poll.unregister(fd)
                self._end_server(self._order.orphan_grace)
        # A lifeline that another process inherited by mistake never ends; the parent's id tells it all the same.
        if os.getppid() != self._order.parent:
            self._end_server(self._order.orphan_grace)
        if self._deadline is not None and time.monotonic() >= self._deadline:
            self._end_tree()
        self._reap()

    def _patience(self) -> float:
        if self._deadline is None:
            return _TICK
        return min(max(self._deadline - time.monotonic(), 0.0), _TICK)

    def _take_signals(self) -> None:
        numbers = os.read(self._signals, 4096)
        if signal.SIGTERM in numbers:
            self._end_server(self._order.grace)
        if signal.SIGINT in numbers:
            self._deadline = time.monotonic()

    def _end_server(self, grace: float) -> None:
        deadline = time.monotonic() + grace
        if self._deadline is None:
            send(self._server, signal.SIGTERM)
            send(self._server, signal.SIGCONT)
        self._deadline = deadline if self._deadline is None else min(self._deadline, deadline)

    def _end_tree(self) -> None:
        """SIGKILL all descendants, again until none is left: one may be forked while we look."""
        pause = 0.001
        while pids := descendants(os.getpid(), process_table()):
            for pid in pids:
                send(pid, signal.SIGKILL)
            time.sleep(pause)
            pause = min(2 * pause, 0.05)
            self._reap()

    def _reap(self) -> None:
        with contextlib.suppress(ChildProcessError):
            while (ended := os.waitpid(-1, os.WNOHANG))[0]:
                if ended[0] == self._server:
                    code = os.waitstatus_to_exitcode(ended[1])
                    self._status = code if code >= 0 else 128 - code

    def _copy_some(self) -> None:
        data = os.read(self._output, 65536)
        self._log.write(data)
        if not data:
            self._poll.unregister(self._output)

    def _copy_rest(self) -> None:
        with contextlib.suppress(BlockingIOError):
            while data := os.read(self._output, 65536):
                self._log.write(data)

    def _remove_socket(self) -> None:
        # vLLM refuses to bind to a path that exists, even when nobody listens there.
        if self._order.socket:
            with contextlib.suppress(OSError):
                os.unlink(self._order.socket)


def _signal_pipe() -> int:
    """Return a descriptor from which the numbers of arriving signals can be read."""
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGCHLD):
        signal.signal(number, lambda *_: None)
    signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    return reader


def _spawn(argv: list[str], output: int) -> int:
    """Start the API server in a process group of its own; its output goes to `output`."""
    files = [
        (os.POSIX_SPAWN_OPEN, 0, "/dev/null", os.O_RDONLY, 0),
        (os.POSIX_SPAWN_DUP2, output, 1),
        (os.POSIX_SPAWN_DUP2, output, 2),
    ]
    defaults = [signal.SIGPIPE, signal.SIGXFSZ]  # Python ignores them, and what is ignored is inherited
    return os.posix_spawnp(argv[0], argv, os.environ, file_actions=files, setpgroup=0, setsigdef=defaults)


def _read_line(fd: int) -> bytes:
    line = b""
    while not line.endswith(b"\n"):
        data = os.read(fd, 65536)
        if not data:
            return b""
        line += data
    return line


def main() -> int:
    """Take the order from stdin and carry it out; without an order, nothing was started and nothing is done."""
    line = _read_line(sys.stdin.fileno())
    if not line:
        return NOT_STARTED
    become_subreaper()
    return Guard(Order(**json.loads(line))).run()


if __name__ == "__main__":
    sys.exit(main())
