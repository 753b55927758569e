"""GET /docs: Swagger UI. The server has its files, so that a browser needs no other host."""

from __future__ import annotations

from fastapi import FastAPI
from fastapi.openapi.docs import get_swagger_ui_html
from fastapi.staticfiles import StaticFiles
from starlette.responses import HTMLResponse

FILES = "/docs/files"


def install(app: FastAPI) -> None:
    """Add /docs and the files of Swagger UI, which the package fastapi-swagger holds."""

    @app.get("/docs", include_in_schema=False)
    async def docs() -> HTMLResponse:
        # Relative addresses work under any root path.
        files = FILES.removeprefix("/")
        return get_swagger_ui_html(
            openapi_url="openapi.json",
            title=f"{app.title} {app.version}",
            swagger_js_url=f"{files}/swagger-ui-bundle.js",
            swagger_css_url=f"{files}/swagger-ui.css",
            swagger_favicon_url=f"{files}/favicon-32x32.png",
            # By default Swagger UI sends the document to a validator on the internet.
            swagger_ui_parameters={"validatorUrl": None},
        )

    app.mount(FILES, StaticFiles(packages=[("fastapi_swagger", "resources")]))
