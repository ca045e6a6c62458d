"""Fetches a file once: with a progress bar, going on where it was interrupted, checked, and whole or not at all."""

import hashlib
import os
import urllib.error
import urllib.request
from pathlib import Path

from tqdm import tqdm

BLOCK = 1 << 20
TIMEOUT = 15  # seconds without a byte


def download(url: str, path: Path, md5: str | None = None, advice: str = "") -> Path:
    """Downloads `url` to `path`, unless it is there.

    Args:
        md5: what the file's MD5 must be; a file that is there already is checked too.
        advice: what to do when the network cannot be reached, for the error.

    Raises:
        ConnectionError: the file is not there and cannot be fetched.
        ValueError: it has the wrong MD5.
    """
    if not path.exists():
        part = path.with_name(path.name + ".part")
        try:
            _fetch(url, part)
        except urllib.error.HTTPError as error:
            raise ConnectionError(
                f"{path} is not there, and {url} answers {error.code} {error.reason}; {advice}"
            ) from error
        except (OSError, urllib.error.URLError) as error:  # no network, or it went away
            kept = f" ({part.stat().st_size:,} bytes are kept in {part})" if part.exists() else ""
            raise ConnectionError(
                f"{path} is not there, and {url} cannot be fetched: {error}{kept}; {advice}"
            ) from error
        _check(part, md5, url)
        os.replace(part, path)
    else:
        _check(path, md5, url)
    return path


def _fetch(url: str, part: Path) -> None:
    have = part.stat().st_size if part.exists() else 0
    request = urllib.request.Request(url, headers={"Range": f"bytes={have}-"} if have else {})
    try:
        answer = urllib.request.urlopen(request, timeout=TIMEOUT)
    except urllib.error.HTTPError as error:
        if have and error.code == 416:  # nothing is left to fetch; the checksum will tell
            return
        raise
    with answer:
        if answer.status != 206:  # the server does not go on where we were
            have = 0
        part.parent.mkdir(parents=True, exist_ok=True)
        total = have + int(answer.headers.get("Content-Length", 0))
        bar = tqdm(total=total or None, initial=have, unit="B", unit_scale=True, desc=part.name.removesuffix(".part"))
        with bar, part.open("ab" if have else "wb") as file:
            while block := answer.read(BLOCK):
                file.write(block)
                bar.update(len(block))
    if total and part.stat().st_size < total:
        raise ConnectionError(
            f"the connection ended after {part.stat().st_size:,} of {total:,} bytes; run again to go on"
        )


def _check(path: Path, md5: str | None, url: str) -> None:
    if md5 is None:
        return
    with path.open("rb") as file:
        found = hashlib.file_digest(file, lambda: hashlib.md5(usedforsecurity=False)).hexdigest()
    if found != md5:
        if path.suffix == ".part":
            path.unlink()
        raise ValueError(
            f"{path} has MD5 {found}, but the file of {url} has {md5}: it is damaged or another one. Remove it to "
            "fetch it again; if it is meant to differ, name it as a local path (--source.path PATH, make: RAW=PATH)"
        )
