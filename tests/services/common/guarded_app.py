"""An app behind a key, with the layers of every service."""

from fastapi import APIRouter, FastAPI
from pydantic import BaseModel
from starlette.responses import Response

from services.common.errors import install_error_handlers
from services.common.json_body import JsonRoute
from services.common.middleware import install_middleware

KEY = "a-key-for-tests"
JSON = {"content-type": "application/json"}
LARGE_BYTES = 32 * 2**20


class Text(BaseModel, extra="forbid"):
    text: str


def guarded_app(*, body_within_s: float = 60.0) -> FastAPI:
    app = FastAPI()
    install_error_handlers(app, {})
    install_middleware(app, keys=(KEY,), max_body_bytes=32 * 2**20, body_within_s=body_within_s)
    router = APIRouter(route_class=JsonRoute)

    @router.get("/livez")
    async def livez() -> str:
        return "alive"

    @router.get("/secret")
    async def secret() -> dict[str, bool]:
        return {"open": True}

    @router.get("/large")
    async def large() -> Response:
        return Response(b"x" * LARGE_BYTES)

    @router.post("/echo")
    async def echo(body: Text) -> Text:
        return body

    app.include_router(router)
    return app
