"""Every error of an HTTP app as a client of OpenAI expects it, those of the framework too."""

from fastapi import FastAPI, Request
from starlette.exceptions import HTTPException
from starlette.responses import Response

from mpt.errors import MPTError
from serving.errors import ApiError, InvalidRequest, MethodNotAllowed, NotFound, RateLimited, adapter_damaged
from serving.http_metrics import HttpMetrics
from serving.routes import methods_of, nearest
from serving.wire import respond


def add_errors(app: FastAPI, metrics: HttpMetrics) -> None:
    """Answer every error with OpenAI's body, the framework's own too."""

    def refusal(request: Request, error: ApiError) -> Response:
        request.state.error = error.code  # for the access log
        return respond(error, request.scope["path"])

    @app.exception_handler(ApiError)
    async def api_error(request: Request, error: ApiError) -> Response:
        if isinstance(error, RateLimited):
            metrics.rate_limited.labels(error.kind).inc()
        return refusal(request, error)

    @app.exception_handler(MPTError)
    async def user_error(request: Request, error: MPTError) -> Response:
        return refusal(request, adapter_damaged(error))

    @app.exception_handler(HTTPException)
    async def http_error(request: Request, error: HTTPException) -> Response:
        path = request.scope["path"]
        where = f"{request.method} {path[:100]}"
        refused: ApiError = InvalidRequest(str(error.detail))
        if error.status_code == 405:
            refused = MethodNotAllowed(f"`{where}` is not a method of this URL")
            refused.headers = {"Allow": ", ".join(sorted(methods_of(app, request.scope)))}
        elif error.status_code == 404:
            refused = NotFound(f"there is no `{where}` here; {nearest(path)}")
        return refusal(request, refused)
