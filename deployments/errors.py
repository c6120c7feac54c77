"""OpenAI's error shape: {"error": {"message", "type", "param", "code"}}, body or SSE event."""

from typing import Any

from pydantic import ValidationError

from magicdec.types import RequestError

INVALID_REQUEST = "invalid_request_error"

# pydantic's error type -> OpenAI's error code
_CODES = {
    "missing": "missing_required_parameter",
    "extra_forbidden": "unknown_parameter",
    "not_served": "unsupported_parameter",
    "json_invalid": "invalid_json",
}


class ApiError(Exception):
    """What the client is told: an HTTP status and OpenAI's four fields."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        kind: str = INVALID_REQUEST,
        param: str | None = None,
        code: str | None = None,
        headers: dict[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.kind = kind
        self.param = param
        self.code = code
        self.headers = headers or {}

    def body(self) -> dict[str, Any]:
        return {
            "error": {
                "message": self.message,
                "type": self.kind,
                "param": self.param,
                "code": self.code,
            }
        }


def from_request_error(error: RequestError) -> ApiError:
    return ApiError(400, error.message, param=error.param, code=error.code)


def from_validation_error(error: ValidationError) -> ApiError:
    """400 naming the field that is wrong; its value is not repeated, since it may be a prompt."""
    errors = error.errors(include_url=False, include_input=False)
    # A union reports every branch it tried: the branch that came furthest is what was meant.
    same_field = [e for e in errors if e["loc"][:1] == errors[0]["loc"][:1]]
    found = max(same_field, key=lambda e: len(_own_path(e["loc"])))
    field = ".".join(str(part) for part in _own_path(found["loc"])) or None
    code = _CODES.get(found["type"], "invalid_value")
    message = f"{field}: {found['msg']}" if field else found["msg"]
    return ApiError(400, message, param=field, code=code)


def _own_path(loc: tuple[int | str, ...]) -> list[int | str]:
    """A location without the names of union branches: str, list[int], ..."""
    return [part for part in loc if isinstance(part, int) or _is_field(part)]


def _is_field(part: str) -> bool:
    return part.isidentifier() and part != "str"


def unauthorized() -> ApiError:
    return ApiError(
        401,
        "Incorrect or missing API key. Send it as 'Authorization: Bearer <key>'.",
        code="invalid_api_key",
        headers={"WWW-Authenticate": "Bearer"},
    )


def model_not_found(name: str, served: str) -> ApiError:
    message = f"The model {name!r} does not exist; this server serves {served!r}."
    return ApiError(404, message, param="model", code="model_not_found")


def overloaded(retry_after_s: float) -> ApiError:
    return ApiError(
        429,
        "The server's queue is full; retry later.",
        kind="rate_limit_error",
        code="queue_full",
        headers={"Retry-After": str(max(1, round(retry_after_s)))},
    )


def internal() -> ApiError:
    """The details go to the log, with the request id; the client gets none of them."""
    message = "The server failed to answer this request."
    return ApiError(500, message, kind="server_error", code="internal_error")


def replica_died_twice() -> ApiError:
    """Not retryable: the request may be what kills replicas, so no client should send it again."""
    return ApiError(
        500,
        "Two replicas died while serving this request; it is not sent to a third.",
        kind="server_error",
        code="replica_died_twice",
        headers={"x-should-retry": "false"},
    )


def replica_unavailable() -> ApiError:
    """Retryable: no replica died of the request, they only went away under it."""
    return ApiError(
        503,
        "The replicas that served this request became unreachable; retry later.",
        kind="server_error",
        code="replica_unavailable",
        headers={"Retry-After": "5"},
    )


def body_too_large(max_bytes: int) -> ApiError:
    message = f"the body is too large: at most {max_bytes} bytes are accepted"
    return ApiError(413, message, code="body_too_large")


def no_replica(waited_s: float) -> ApiError:
    return ApiError(
        503,
        f"No replica could take this request within {waited_s:.0f} s.",
        kind="server_error",
        code="no_replica_available",
        headers={"Retry-After": "5"},
    )
