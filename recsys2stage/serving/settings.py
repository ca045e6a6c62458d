"""The options of `recsys serve`, checked before a process starts."""

import ipaddress
from dataclasses import dataclass, fields
from pathlib import Path

from recsys2stage.options import check_integer

STORE = "store.sqlite"  # default name, beside the bundle
MIN_KEY = 16  # characters of an API key

COUNTS = {  # option -> least value
    "port": 0,
    "workers": 1,
    "torch_threads": 1,
    "batch_size": 1,
    "queue": 1,
    "max_body": 1_024,
    "max_k": 1,
    "max_list": 1,
    "max_batch": 1,
    "cached_events": 0,
    "cached_states": 0,
}
SECONDS = ("timeout", "keep_alive", "shutdown_timeout")


@dataclass(frozen=True)
class Settings:
    """How a bundle is served.

    Args:
        bundle: folder written by export-bundle or export-index, or a symbolic link to one.
        data: prepared dataset with the known users' histories; None: those packed into the bundle, else the dataset
            that the bundle was made from, if it is there.
        store: SQLite file of new events and impressions; None: store.sqlite, in the bundle's parent folder.
        host: address to listen on.
        port: TCP port; 0: any free one.
        workers: number of worker processes.
        api_keys: text file with an API key per line; None: no keys, on loopback addresses only.
        cors: origins whose pages may call the service, such as https://shop.example.
        trust: modules outside this package from which the bundle may load classes.
        torch_threads: threads of each worker's computation.
        batch_size: maximum number of requests that are computed together.
        queue: maximum number of requests that wait in a worker; further ones get 429.
        timeout: seconds until a request gets 504.
        keep_alive: seconds until an idle connection is closed.
        shutdown_timeout: seconds that running requests have when the service ends.
        max_body: maximum size of a request body in bytes.
        max_k: maximum number of items that a request may ask for, offset included.
        max_list: maximum number of entries of a list in a request: history, exclude, allow, shown, items.
        max_batch: maximum number of requests of /v1/recommend/batch, and of events of /v1/events.
        cached_events: maximum number of events that a worker keeps in memory, of users with new events; about 32 bytes
            each, and a user counts as 32 events more.
        cached_states: maximum MiB of a worker's memory for what a causal encoder has computed of returning users, so
            that a request computes only new events; 0: every request computes the whole history.
        log_requests: whether each request is logged.
    """

    bundle: Path
    data: Path | None = None
    store: Path | None = None
    host: str = "127.0.0.1"
    port: int = 8000
    workers: int = 1
    api_keys: Path | None = None
    cors: tuple[str, ...] = ()
    trust: tuple[str, ...] = ()
    torch_threads: int = 1
    batch_size: int = 32
    queue: int = 128
    timeout: float = 10.0
    keep_alive: float = 5.0
    shutdown_timeout: float = 30.0
    max_body: int = 1 << 20
    max_k: int = 1_000
    max_list: int = 10_000
    max_batch: int = 100
    cached_events: int = 2_000_000
    cached_states: int = 256
    log_requests: bool = True

    def __post_init__(self) -> None:
        for name, least in COUNTS.items():
            check_integer(name, getattr(self, name), least)
        if self.port > 65_535:
            raise ValueError(f"port is {self.port}, expected 0 to 65535; 0 takes a free one")
        for name in SECONDS:
            if not 0 < getattr(self, name) < 86_400:
                raise ValueError(f"{name} is {getattr(self, name)}, expected seconds above 0 and below 86400")
        if self.api_keys is None and not is_loopback(self.host):
            raise ValueError(
                f"host is {self.host!r} and there are no API keys, so anybody could read and erase users; give "
                "--api_keys FILE, or listen on 127.0.0.1 behind a proxy"
            )
        for origin in self.cors:
            scheme, separator, rest = origin.partition("://")
            if origin != "*" and not (separator and scheme in ("http", "https") and rest and "/" not in rest):
                raise ValueError(f"cors holds {origin!r}, expected an origin such as https://shop.example, or *")
        if self.api_keys is not None:
            read_keys(self.api_keys)

    @property
    def store_path(self) -> Path:
        """Where new events are kept."""
        return self.store or Path(self.bundle).parent / STORE

    @property
    def keys(self) -> tuple[bytes, ...]:
        """The API keys; empty without a file."""
        return () if self.api_keys is None else read_keys(self.api_keys)

    @property
    def limits(self) -> dict[str, int | float]:
        """The limits of a request, for /v1/info."""
        names = ("max_body", "max_k", "max_list", "max_batch", "queue", "timeout")
        return {field.name: getattr(self, field.name) for field in fields(self) if field.name in names}


def is_loopback(host: str) -> bool:
    """Whether an address is reached from this machine only."""
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return host == "localhost"


def read_keys(path: Path) -> tuple[bytes, ...]:
    """Reads a file with an API key per line; empty lines and lines that begin with # are skipped.

    Raises:
        ValueError: if the file has no key, or one that is too short or has other characters than visible ASCII. The
            message does not hold the key.
    """
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(
            f"the file of API keys {path} cannot be read ({error}); write a text file, one key a line"
        ) from error
    keys = []
    for number, line in enumerate(map(str.strip, lines), start=1):
        if not line or line.startswith("#"):
            continue
        if len(line) < MIN_KEY or not all("!" <= letter <= "~" for letter in line):
            raise ValueError(
                f"{path}, line {number}: the key has {len(line)} characters, expected at least {MIN_KEY} of visible "
                "ASCII without spaces; make one with: openssl rand -hex 24"
            )
        keys.append(line.encode())
    if not keys:
        raise ValueError(f"{path} has no API key, expected one a line; make one with: openssl rand -hex 24 >> {path}")
    return tuple(keys)
