"""The application: routes, errors and middleware around one loaded bundle."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from fastapi import FastAPI

from recsys2stage import __version__
from recsys2stage.serving.middleware import install
from recsys2stage.serving.monitoring import Metrics
from recsys2stage.serving.page_files import add_page
from recsys2stage.serving.problems import add_handlers
from recsys2stage.serving.routes import router
from recsys2stage.serving.service import Service
from recsys2stage.serving.settings import Settings


def create_app(settings: Settings) -> FastAPI:
    """An ASGI application that serves a bundle; it is loaded, checked and warmed when the application starts.

    Args:
        settings: how to serve.
    """
    metrics = Metrics()

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        service = await asyncio.to_thread(Service, settings, metrics)
        app.state.service = service
        yield
        await asyncio.to_thread(service.close)

    app = FastAPI(
        title="recsys2stage",
        version=__version__,
        description="Recommendations in two stages. Ids are text; errors are problem details (RFC 9457).",
        lifespan=lifespan,
        docs_url=None,  # their scripts come from another host
        redoc_url=None,
    )
    app.state.metrics = metrics
    add_handlers(app)
    app.include_router(router)
    add_page(app)
    install(app, settings, metrics)
    return app
