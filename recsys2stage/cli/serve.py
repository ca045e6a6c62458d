"""The commands serve and export-log: a bundle as an HTTP service, and what it has logged."""

from importlib.util import find_spec
from pathlib import Path

from recsys2stage.artifacts import RUN
from recsys2stage.data.summary import print_summary
from recsys2stage.options import not_installed
from recsys2stage.serving.export_log import export_log as write_log
from recsys2stage.serving.settings import STORE as STORE
from recsys2stage.serving.settings import Settings
from recsys2stage.trust import Trust

NEEDED = ("fastapi", "uvicorn", "prometheus_client")  # of the extra `serve`


def serve(
    bundle: Path = RUN / "bundle",
    data: Path | None = None,
    store: Path | None = None,
    host: str = Settings.host,
    port: int = Settings.port,
    workers: int = Settings.workers,
    api_keys: Path | None = None,
    cors: list[str] | str | None = None,
    torch_threads: int = Settings.torch_threads,
    batch_size: int = Settings.batch_size,
    queue: int = Settings.queue,
    timeout: float = Settings.timeout,
    keep_alive: float = Settings.keep_alive,
    shutdown_timeout: float = Settings.shutdown_timeout,
    max_body: int = Settings.max_body,
    max_k: int = Settings.max_k,
    max_list: int = Settings.max_list,
    max_batch: int = Settings.max_batch,
    cached_events: int = Settings.cached_events,
    cached_states: int = Settings.cached_states,
    log_requests: bool = Settings.log_requests,
    trust: Trust = None,
) -> None:
    """Serve a bundle over HTTP, with a page at /.

    SIGHUP, or a symbolic link that leads to another bundle, changes the bundle without a failed request. SIGTERM and
    Ctrl-C end the service once the running requests are answered.

    Args:
        bundle: folder written by export-bundle or export-index, or a symbolic link to one.
        data: prepared dataset with the known users' histories; None: those packed into the bundle, else the dataset
            that the bundle was made from, if it is there.
        store: SQLite file of new events and impressions; None: store.sqlite, in the bundle's parent folder.
        host: address to listen on.
        port: TCP port; 0: any free one.
        workers: number of worker processes.
        api_keys: text file with an API key per line; None: no keys, on loopback addresses only.
        cors: origins whose pages may call the service, such as https://shop.example; None: none.
        torch_threads: threads of each worker's computation.
        batch_size: maximum number of requests that are computed together.
        queue: maximum number of requests that wait in a worker; further ones get 429.
        timeout: seconds until a request gets 504.
        keep_alive: seconds until an idle connection is closed.
        shutdown_timeout: seconds that running requests have when the service ends.
        max_body: maximum size of a request body in bytes.
        max_k: maximum number of items that a request may ask for, offset included.
        max_list: maximum number of entries of a list in a request.
        max_batch: maximum number of requests of a batch, and of events of one request.
        cached_events: maximum number of events that a worker keeps in memory, of users with new events; about 32 bytes
            each, and a user counts as 32 events more.
        cached_states: maximum MiB of a worker's memory for what a causal encoder has computed of returning users, so
            that a request computes only new events; 0: every request computes the whole history.
        log_requests: whether each request is logged.
        trust: modules outside this package from which the bundle may load classes.
    """
    options = dict(locals())
    if missing := [name for name in NEEDED if find_spec(name) is None]:
        raise ValueError(f"serve needs {not_installed(missing)}: pip install 'recsys2stage[serve]'")
    lists = {"cors": cors, "trust": trust}
    several = {name: (given,) if isinstance(given, str) else tuple(given or ()) for name, given in lists.items()}
    settings = Settings(**options | several)
    from recsys2stage.serving.server import run  # of the extra

    run(settings)


def export_log(store: Path = RUN / STORE, output: Path | None = None, remove: bool = False) -> None:
    """Export the events and impressions of a service as Parquet.

    The folder gets events.parquet (user_id, item_id, time, rating, action, request_id, received) and
    impressions.parquet (request_id, bundle, user_id, time, item_id, position), a row for each item of a list.

    Args:
        store: file of the service, which may be running.
        output: folder to write; None: log, in the folder of the store.
        remove: whether to remove the exported impressions from the store afterwards; events stay.
    """
    output = output or store.parent / "log"
    counts = write_log(store, output, remove)
    print_summary(output, f"{counts['events']:,} events, {counts['impressions']:,} impressions")
