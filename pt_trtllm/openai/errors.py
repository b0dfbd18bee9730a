"""What clients are told when a request cannot be answered, in OpenAI's form."""

from __future__ import annotations

from typing import Any

from pt_trtllm.errors import Kind, ServingError
from pt_trtllm.serving.error_marks import Told

BAD_REQUEST, UNAUTHORIZED, NOT_FOUND, TOO_MANY, FAILED, UNAVAILABLE = 400, 401, 404, 429, 500, 503
TYPES = {BAD_REQUEST: "invalid_request_error", NOT_FOUND: "invalid_request_error", TOO_MANY: "rate_limit_error"}

MEANINGS: dict[Kind, tuple[int, str | None]] = {
    "invalid": (BAD_REQUEST, None),
    "too_long": (BAD_REQUEST, "context_length_exceeded"),
    "queue_full": (TOO_MANY, "queue_full"),
    "unavailable": (UNAVAILABLE, None),
    "failed": (FAILED, None),
}
"""HTTP status and OpenAI's code of each kind of error."""


class ApiError(ServingError):
    """Answers a request with an HTTP status and OpenAI's error body."""

    def __init__(
        self, message: str, *, status: int = BAD_REQUEST, param: str | None = None, code: str | None = None
    ) -> None:
        super().__init__(message)
        self.status, self.param, self.code = status, param, code

    @classmethod
    def of(cls, told: Told) -> ApiError:
        """What the engine's server said, as this server's answer."""
        status, code = MEANINGS[told.kind]
        return cls(told.message, status=status, code=code)

    def body(self) -> dict[str, Any]:
        kind = TYPES.get(self.status, "invalid_request_error" if self.status < FAILED else "server_error")
        return {"error": {"message": str(self), "type": kind, "param": self.param, "code": self.code}}
