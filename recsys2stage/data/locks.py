"""One run at a time writes an output: while it runs, a lock file next to the output names its process and host."""

import fcntl
import json
import os
import socket
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from recsys2stage.artifacts import explained, is_alive

PATIENCE = 1.0  # seconds to wait for the content of a lock file that another process has just created


@contextmanager
def locked(output: str | Path) -> Iterator[None]:
    """Holds the lock of an output, a file or a folder, which need not exist.

    The lock is the file `.NAME.running` next to the output, created with O_EXCL, which also works on network file
    systems. It is removed on exit. The lock of a process of this host that has ended, even by SIGKILL, is taken over.

    Args:
        output: the file or folder that the caller writes.

    Raises:
        ValueError: if another run holds the lock, with its process, host and start.
        OSError: if the folder of the output cannot be written.
    """
    output = Path(output)
    whole = output.parent.resolve() / output.name if output.name not in ("", "..") else output.resolve()
    lock, own = whole.with_name(f".{whole.name}.running"), _identity()
    made = [folder for folder in (lock.parent, *lock.parent.parents) if not folder.exists()]
    with explained(whole):
        lock.parent.mkdir(parents=True, exist_ok=True)
        _acquire(lock, output, own)
    try:
        yield
    finally:
        if own["pid"] == os.getpid() and _read(lock) == own:  # not in a forked child; not if someone removed the lock
            lock.unlink(missing_ok=True)
            with suppress(OSError):  # a run that wrote nothing leaves no folder
                for folder in made:
                    folder.rmdir()


def _identity() -> dict[str, Any]:
    """What a lock file holds: this process."""
    command = " ".join(sys.argv)
    return {
        "pid": os.getpid(),
        "host": socket.gethostname(),
        "started": _started(os.getpid()),
        "since": time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime()),
        "command": command if len(command) <= 200 else f"{command[:197]}...",
    }


def _started(pid: int) -> str | None:
    """Start of a process in clock ticks since boot, which tells it from a later one with its id; None if unknown."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
        return stat.rpartition(")")[2].split()[19]
    except (OSError, IndexError):
        return None


def _acquire(lock: Path, output: Path, own: dict[str, Any]) -> None:
    content = json.dumps(own).encode()
    while True:
        with suppress(FileExistsError):
            descriptor = os.open(lock, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o644)
            try:
                os.write(descriptor, content)
            finally:
                os.close(descriptor)
            return
        try:
            with lock.open("r+b") as file:
                with suppress(OSError):  # where the file system has no flock, two takeovers may race
                    fcntl.flock(file, fcntl.LOCK_EX)
                if not _is_current(lock, file.fileno()):
                    continue
                _refuse_living(_wait_for_content(lock), lock, output)
                file.truncate(0)  # overwritten in place: whoever waits for the flock reads the new holder
                file.write(content)
                return
        except FileNotFoundError:  # released since
            continue


def _is_current(lock: Path, descriptor: int) -> bool:
    """Whether an open lock file is still the one at its path."""
    try:
        return os.path.samestat(lock.stat(), os.fstat(descriptor))
    except FileNotFoundError:
        return False


def _read(lock: Path) -> dict[str, Any] | None:
    """The holder named in a lock file; None if it is empty or damaged."""
    try:
        content = json.loads(lock.read_bytes()[:4096])
    except (OSError, ValueError):
        return None
    whole = isinstance(content, dict) and type(content.get("pid")) is int and isinstance(content.get("host"), str)
    return content if whole else None


def _wait_for_content(lock: Path) -> dict[str, Any] | None:
    """Reads a lock file; waits for its content, because creating and writing are two steps."""
    end = time.monotonic() + PATIENCE
    while (holder := _read(lock)) is None and lock.exists() and time.monotonic() < end:
        time.sleep(0.02)
    return holder


def _refuse_living(holder: dict[str, Any] | None, lock: Path, output: Path) -> None:
    """Raises a ValueError unless the holder is known to have ended."""
    if holder is None:  # killed between creating and writing
        return
    pid, host, since = holder["pid"], holder["host"], holder.get("since")
    if host != socket.gethostname():
        raise ValueError(
            f"{output} is being written by process {pid} on the host {host} since {since}, expected no other run; wait "
            f"for it, or, if it has ended, remove {lock}"
        )
    if not is_alive(pid) or _started(pid) != holder.get("started"):
        return
    raise ValueError(
        f"{output} is being written by process {pid} since {since} ({holder.get('command')}), expected no other run; "
        "wait for it to end, or choose another output"
    )
