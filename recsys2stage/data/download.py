"""File download: resumable, with progress bar and MD5 check; the target file is renamed into place when complete."""

import hashlib
import os
import urllib.error
import urllib.request
from pathlib import Path

from tqdm import tqdm

BLOCK = 1 << 20
TIMEOUT = 15  # seconds without data


def download(url: str, path: Path, md5: str | None = None, advice: str = "") -> Path:
    """Downloads `url` to `path` unless the file exists.

    Args:
        md5: expected MD5 of the file; an existing file is checked too.
        advice: the next step for the error message if the download fails.

    Raises:
        ConnectionError: if the download fails.
        ValueError: for a wrong MD5.
    """
    if not path.exists():
        part = path.with_name(path.name + ".part")
        try:
            _fetch(url, part)
        except urllib.error.HTTPError as error:
            raise ConnectionError(
                f"{path} does not exist, and {url} returned {error.code} {error.reason}; {advice}"
            ) from error
        except (OSError, urllib.error.URLError) as error:  # no network, or connection lost
            kept = f" ({part.stat().st_size:,} bytes are kept in {part})" if part.exists() else ""
            raise ConnectionError(
                f"{path} does not exist, and {url} cannot be downloaded: {error}{kept}; {advice}"
            ) from error
        _check(part, md5, url)
        os.replace(part, path)
    else:
        _check(path, md5, url)
    return path


def _fetch(url: str, part: Path) -> None:
    offset = part.stat().st_size if part.exists() else 0
    request = urllib.request.Request(url, headers={"Range": f"bytes={offset}-"} if offset else {})
    try:
        response = urllib.request.urlopen(request, timeout=TIMEOUT)
    except urllib.error.HTTPError as error:
        if offset and error.code == 416:  # the range is empty: the file is complete, to be verified by the checksum
            return
        raise
    with response:
        if response.status != 206:  # the server does not support resuming
            offset = 0
        part.parent.mkdir(parents=True, exist_ok=True)
        total = offset + int(response.headers.get("Content-Length", 0))
        bar = tqdm(total=total or None, initial=offset, unit="B", unit_scale=True, desc=part.name.removesuffix(".part"))
        with bar, part.open("ab" if offset else "wb") as file:
            while block := response.read(BLOCK):
                file.write(block)
                bar.update(len(block))
    if total and part.stat().st_size < total:
        raise ConnectionError(
            f"the connection ended after {part.stat().st_size:,} of {total:,} bytes; run again to resume"
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
            f"{path} has MD5 {found}, expected {md5} of {url}: it is damaged or another version. Remove it to "
            "download it again; if it is meant to differ, pass it as a local path (--source.path PATH, make: RAW=PATH)"
        )
