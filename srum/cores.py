"""The cores of one machine: copies of a command that share its work, and how its threads wait.

Threads of one process wait for one another at every operation: two used 1.4 cores, and beside other work they spin in
vain. Processes of a thread each meet only at the end of a stage. The command line starts them (``srum.cli.main``); code
that imports srum stays in its one process. Nothing here imports a tensor library: how threads wait is read when that is
loaded.
"""

from __future__ import annotations

import _thread
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from srum.errors import SrumError

STORE = "SRUM_STORE"  # names, to a helper, the file by which the processes find each other
GRACE = 10.0  # seconds that a process has to end
INTERRUPTED = (-signal.SIGINT, 130, 0xC000013A)  # exit codes of what Ctrl-C ended; the last is of Windows
KEPT = "what is finished is kept; the same command goes on, srum run with --resume"
BUSY = 0.5  # load per core from which threads that wait sleep
QUOTA = Path("/sys/fs/cgroup/cpu.max")

_command: Sequence[str] | None = None


class LostProcess(SrumError, RuntimeError):
    """Another process has ended, or cannot be reached."""


def command_line() -> None:
    """This program is the command: its command line may start others, and its threads wait as suits the load."""
    global _command
    _command = [sys.executable, *sys.orig_argv[1:]]
    if os.name == "posix" and os.getloadavg()[0] > BUSY * (os.cpu_count() or 1):
        os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")


def can_be_started_again() -> bool:
    """Whether this program is the command, and not a library in another."""
    return _command is not None


def quota() -> float:
    """How many cores the container that this is may use; infinite where nothing says so."""
    try:
        most, period = QUOTA.read_text().split()
        return int(most) / int(period)
    except (OSError, ValueError):  # no such file; "max" is no limit
        return float("inf")


class Helper:
    """One of the processes that this one has started. It ends as soon as its input does, and so with this process."""

    def __init__(self, rank: int, count: int, threads: int, place: Path) -> None:
        assert _command is not None
        self.rank, self.count, self.words = rank, count, place / f"{rank}.txt"
        mine = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(count), STORE: str(place / "store")}
        with self.words.open("wb") as words:
            self.process = subprocess.Popen(
                _command,
                env=os.environ | mine | {"OMP_NUM_THREADS": str(threads)},
                stdin=subprocess.PIPE,
                stdout=subprocess.DEVNULL,
                stderr=words,
            )

    def watch(self, ending: threading.Event) -> None:
        """Interrupt the main thread where the process fails before that wants an end."""
        if self.process.wait() and not ending.is_set():
            _thread.interrupt_main()

    def fault(self) -> str:
        """What it failed of in one line, all of a traceback having been printed; empty where it did not fail."""
        code = self.process.poll()
        if not code or code in INTERRUPTED:
            return ""
        name, words = f"process {self.rank} of {self.count}", self.words.read_text(errors="replace")
        if code < 0:
            why = ", perhaps for want of memory: processes=1 takes the least" if code == -signal.SIGKILL else ""
            return f"{name} was ended by signal {-code}{why}; {KEPT}"
        *_, last = words.splitlines() or [""]
        if last.startswith("error: "):
            return last.removeprefix("error: ")
        sys.stderr.write(words)
        return f"{name} failed with exit code {code}"

    def end(self) -> None:
        """Have it end, and wait for that."""
        assert self.process.stdin is not None
        self.process.stdin.close()
        try:
            self.process.wait(GRACE)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()


@contextmanager
def helpers(count: int, threads: int) -> Iterator[Path]:
    """Beside this process ``count - 1`` that run the same command with so many threads; the file by which all meet.

    They are there when the block begins, and end with it or with this process, in whatever way. Raises LostProcess,
    with its words, where one of them fails first.
    """
    ending = threading.Event()
    with tempfile.TemporaryDirectory(prefix="srum-") as place:
        started = [Helper(rank, count, threads, Path(place)) for rank in range(1, count)]
        try:
            for helper in started:
                threading.Thread(target=helper.watch, args=(ending,), daemon=True).start()
            while len(list(Path(place).glob("*.here"))) < len(started):
                time.sleep(0.02)
            yield Path(place) / "store"
            ending.set()
            for helper in started:
                helper.process.wait()
        except (LostProcess, KeyboardInterrupt) as error:
            ending.set()
            if isinstance(error, LostProcess):
                _await_an_end(started)
            if fault := _fault(started):
                raise LostProcess(fault) from None
            if any(helper.process.poll() in INTERRUPTED for helper in started):
                raise KeyboardInterrupt from None
            raise
        finally:
            ending.set()
            for helper in started:
                helper.end()


def _await_an_end(started: Sequence[Helper]) -> None:
    until = time.monotonic() + GRACE
    while all(helper.process.poll() is None for helper in started) and time.monotonic() < until:
        time.sleep(0.02)


def _fault(started: Sequence[Helper]) -> str:
    """What one of them failed of; that it lost another one only where there is no more to say."""
    faults = [fault for helper in started if (fault := helper.fault())]
    return min(faults, key=lambda fault: "lost another one" in fault, default="")


def join(environment: Mapping[str, str]) -> Path:
    """As a helper: say that this process is here, end at once by Ctrl-C and where the one that started it ends.

    Returns the file by which all meet.
    """
    store = Path(environment[STORE])
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    threading.Thread(target=_follow, daemon=True).start()
    (store.parent / f"{environment['RANK']}.here").touch()
    return store


def _follow() -> None:
    os.read(0, 1)  # returns where the other end is closed
    os._exit(1)
