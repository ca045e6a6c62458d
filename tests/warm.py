"""Commands of `recsys`, each in a process of its own, without each importing torch, which takes longer than they do.

`python warm.py SOCKET` imports the package once. For every command that comes through the socket it forks a copy,
which takes over the caller's folder, environment and outputs, runs the command and gives its exit code back.
"""

import contextlib
import json
import os
import shlex
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

CLIENT = """#!{python} -SE
import json, os, socket, sys
with socket.socket(socket.AF_UNIX) as server:
    server.connect({path!r})
    socket.send_fds(server, [json.dumps([sys.argv[1:], os.getcwd(), dict(os.environ)]).encode()], [1, 2])
    server.shutdown(socket.SHUT_WR)
    sys.exit(int(server.recv(16) or 1))
"""
START = 120  # seconds


@contextlib.contextmanager
def warm(python: Path, folder: Path) -> Iterator[str]:
    """A program to call in place of `recsys`, of the package that `python` imports from `folder`."""
    with tempfile.TemporaryDirectory(prefix="recsys") as short:  # the path of a socket has at most 100 characters
        path, program = f"{short}/socket", folder / "recsys"
        program.write_text(CLIENT.format(python=sys.executable, path=path))
        program.chmod(0o755)
        environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
        server = subprocess.Popen([python, __file__, path], cwd=folder, env=environment)
        try:
            deadline = time.monotonic() + START
            while not Path(path).exists():
                assert server.poll() is None
                assert time.monotonic() < deadline
                time.sleep(0.05)
            yield shlex.quote(str(program))
        finally:
            server.kill()
            server.wait()


def next_command(path: str) -> None:
    """Serves commands one after the other; returns in each copy, once it stands where its caller stood."""
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(path)
        listener.listen()
        while True:
            connection, _ = listener.accept()
            with connection:
                text, outputs, _, _ = socket.recv_fds(connection, 1 << 16, 2)
                while part := connection.recv(1 << 16):
                    text += part
                words, folder, environment = json.loads(text)
                copy = os.fork()
                if not copy:
                    for number, output in enumerate(outputs, start=1):
                        os.dup2(output, number)
                    os.chdir(folder)
                    os.environ.clear()
                    os.environ.update(environment)
                    sys.argv = ["recsys", *words]
                    return
                for output in outputs:
                    os.close(output)
                _, status = os.waitpid(copy, 0)
                with contextlib.suppress(BrokenPipeError):
                    connection.sendall(str(os.waitstatus_to_exitcode(status) % 256).encode())


if __name__ == "__main__":
    from recsys2stage.__main__ import main
    from recsys2stage.cli import training  # noqa: F401  # imported once, before commands are forked
    from recsys2stage.cli.main import COMMANDS  # noqa: F401  # likewise, for commands that do not train

    del sys.path[0]  # this folder: a command finds no module here
    next_command(sys.argv[1])
    main()
