"""A worker process: loads the bundle, then answers requests on the socket that it inherits, until it is told to end.

SIGTERM ends it: it takes no more connections and answers the requests that it has. SIGUSR1 replaces it: it goes on
answering on the connections that it has, tells each client to open a new one, and ends when all have left.
"""

import asyncio
import contextlib
import gc
import logging
import os
import signal
import socket
import time
import warnings
from collections.abc import AsyncIterator, Generator
from dataclasses import replace
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
import torch._dynamo  # loading a model on the meta device imports its 800 modules: here once, for all workers
import uvicorn
from fastapi import FastAPI

from recsys2stage.artifacts import fingerprint
from recsys2stage.serving import monitoring
from recsys2stage.serving.app import create_app
from recsys2stage.serving.settings import Settings

END, REPLACE = signal.SIGTERM, signal.SIGUSR1
READY, FAILED = "ready", "failed"  # messages to the supervisor, each with a text: the bundle's identity, the reason
CLOSE = (b"connection", b"close")

logger = logging.getLogger("recsys2stage.serving")


def work(
    settings: Settings, bundle: Path, listener: socket.socket, slot: str, metrics: Path, supervisor: Connection
) -> None:
    """Runs a worker; the body of the process.

    Args:
        settings: as given.
        bundle: the folder to load: where the settings' one leads, if that is a symbolic link.
        listener: the bound socket, shared by all workers.
        slot: name of its metrics files.
        metrics: folder of the metrics of all workers.
        supervisor: where it reports that it is ready or has failed.
    """
    signal.set_wakeup_fd(-1)  # the supervisor's
    for number in (signal.SIGINT, signal.SIGHUP):  # the terminal sends them to all processes; the supervisor decides
        signal.signal(number, signal.SIG_IGN)
    signal.signal(END, signal.SIG_DFL)
    monitoring.configure_logging()
    monitoring.share(metrics, slot)
    limit_threads(settings.torch_threads)
    server: Server | None = None
    reasons: list[str] = []
    try:
        settings = replace(settings, bundle=bundle, store=settings.store_path)
        identity = fingerprint(bundle)  # before it is loaded: if it is replaced meanwhile, the supervisor sees another
        app = create_app(settings)
        reasons = keep_reasons(app)
        config = uvicorn.Config(
            app,
            lifespan="on",
            ws="none",
            log_config=None,
            access_log=False,
            server_header=False,
            timeout_keep_alive=max(1, round(settings.keep_alive)),
            timeout_graceful_shutdown=max(1, round(settings.shutdown_timeout)),
        )
        server = Server(config, settings, supervisor, str(identity))
        server.run(sockets=[listener])
    except SystemExit:  # the application did not start
        reason = reasons[0] if reasons else "the application did not start"
        send(supervisor, FAILED, reason)
    except Exception as error:
        logger.exception("the worker ended")
        send(supervisor, FAILED, str(error) or type(error).__name__)
    logging.shutdown()
    os._exit(
        0 if server is not None and server.started else 1
    )  # without the handlers of the process it was forked from


def keep_reasons(app: FastAPI) -> list[str]:
    """Wraps the application's lifespan; returns the list to which the message of an error at its start is added."""
    lifespan, reasons = app.router.lifespan_context, list[str]()

    @contextlib.asynccontextmanager
    async def observed(app: Any) -> AsyncIterator[Any]:
        context = lifespan(app)
        try:
            state = await context.__aenter__()
        except Exception as error:
            reasons.append(str(error) or type(error).__name__)
            raise
        try:
            yield state
        finally:
            await context.__aexit__(None, None, None)

    app.router.lifespan_context = observed
    return reasons


def limit_threads(threads: int) -> None:
    """Limits the threads of torch and faiss in this process."""
    torch.set_num_threads(threads)
    with contextlib.suppress(ImportError), warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of its bindings
        import faiss

        faiss.omp_set_num_threads(threads)


def send(supervisor: Connection, kind: str, text: str) -> None:
    with contextlib.suppress(OSError):  # it has ended
        supervisor.send((kind, text))


class Server(uvicorn.Server):
    """uvicorn's server with the two ways to end, idle connections dropped, and metrics sampled.

    Args:
        config: uvicorn's options; the application keeps its metrics in `app.state.metrics`.
        settings: of the service.
        supervisor: told when requests are answered.
        identity: of the bundle.
    """

    def __init__(self, config: uvicorn.Config, settings: Settings, supervisor: Connection, identity: str) -> None:
        super().__init__(config)
        self.settings, self.supervisor, self.identity = settings, supervisor, identity
        self.parent = os.getppid()
        self.leaving: float | None = None  # when it was replaced, by the monotonic clock
        self.silent: dict[Any, float] = {}  # connections without a whole request's head -> since when

    @property
    def metrics(self) -> monitoring.Metrics:
        return self.config.app.state.metrics  # type: ignore[union-attr]  # an application, never its name

    @contextlib.contextmanager
    def capture_signals(self) -> Generator[None, None, None]:
        loop = asyncio.get_running_loop()
        loop.add_signal_handler(END, self.end)
        loop.add_signal_handler(REPLACE, self.replace)
        yield

    def end(self) -> None:
        """Ends once the running requests are answered."""
        self.should_exit = True

    def replace(self) -> None:
        """Takes no more connections, and ends once those it has are closed."""
        if self.leaving is None and self.started:
            self.leaving = time.monotonic()
            self.stop_accepting()
            self.server_state.default_headers = [*self.server_state.default_headers, CLOSE]

    def stop_accepting(self) -> None:
        """Leaves new connections to the other workers. `close` would drop those accepted a moment ago."""
        loop = asyncio.get_running_loop()
        for server in self.servers:
            if isinstance(loop, asyncio.SelectorEventLoop):
                for listener in server.sockets:
                    loop.remove_reader(listener.fileno())
            else:
                server.close()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        self.stop_accepting()
        await asyncio.sleep(0.05)  # connections that were accepted get their protocol
        await super().shutdown(sockets=sockets)

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets=sockets)
        if self.started:
            gc.collect()
            gc.freeze()  # the model and the libraries: no later collection goes through them
            self.metrics.running.set(1)
            send(self.supervisor, READY, self.identity)

    async def on_tick(self, counter: int) -> bool:
        """Called ten times a second; returns whether to end."""
        ends = await super().on_tick(counter)
        if counter % 10 == 0:
            self.metrics.sample()
            self.drop_silent()
            if os.getppid() != self.parent:
                logger.error("the supervisor is gone; the worker ends")
                return True
            if self.leaving is not None:
                self.server_state.default_headers = [*self.server_state.default_headers, CLOSE]
        if self.leaving is not None:  # idle connections are closed after keep_alive, and had their last answer by then
            late = time.monotonic() - self.leaving > self.config.timeout_keep_alive + 1
            return ends or late or not self.server_state.connections
        return ends

    def drop_silent(self) -> None:
        """Closes connections that send no whole request within the time of one."""
        now, silent = time.monotonic(), dict[Any, float]()
        connections: list[Any] = list(self.server_state.connections)  # their classes have no common base
        for connection in connections:
            cycle = connection.cycle
            idle = cycle is None or cycle.response_complete
            if idle and connection.timeout_keep_alive_task is None and connection.transport is not None:
                silent[connection] = self.silent.get(connection, now)
                if now - silent[connection] > self.settings.timeout:
                    connection.transport.abort()
        self.silent = silent
