"""The page: the files of the folder page/, at / and /static. They are few and small, so they are kept in memory."""

import hashlib
from pathlib import Path
from typing import NamedTuple

from fastapi import FastAPI, HTTPException, Request, Response

FOLDER = Path(__file__).parent / "page"
TYPES = {  # said here, for what a system takes .js for differs, and a browser runs no text/plain
    ".html": "text/html; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".svg": "image/svg+xml",
}
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; base-uri 'none'; "
    "form-action 'none'; frame-ancestors 'none'; require-trusted-types-for 'script'; trusted-types 'none'"
)


class File(NamedTuple):
    """A file as it is sent."""

    body: bytes
    headers: dict[str, str]


def read_files(folder: Path = FOLDER) -> dict[str, File]:
    """The files of the page by name."""
    files = {}
    for path in sorted(folder.iterdir()):
        if path.suffix in TYPES:
            body = path.read_bytes()
            headers = {
                "Content-Type": TYPES[path.suffix],
                "Content-Security-Policy": POLICY,
                "ETag": f'"{hashlib.sha256(body).hexdigest()[:32]}"',
                "Cache-Control": "no-cache",  # kept, but asked for again, so that an update shows at once
            }
            files[path.name] = File(body, headers)
    return files


def add_page(app: FastAPI) -> None:
    """Adds the page to an application; its paths are no part of the API's schema."""
    files = read_files()

    async def send(request: Request) -> Response:
        name = request.path_params.get("name", "index.html")
        if name not in files:
            raise HTTPException(404, f"the page has no file {name!r}; it starts at /")
        body, headers = files[name]
        if headers["ETag"] in request.headers.get("if-none-match", ""):
            return Response(status_code=304, headers={key: headers[key] for key in ("ETag", "Cache-Control")})
        return Response(body, headers=headers)

    app.add_route("/", send, methods=["GET"], include_in_schema=False)  # and HEAD
    app.add_route("/static/{name}", send, methods=["GET"], include_in_schema=False)
