"""What clients are told when a request cannot be answered, in OpenAI's form."""

from __future__ import annotations

from typing import Any

from pt_trtllm.errors import ServingError

BAD_REQUEST, UNAUTHORIZED, NOT_FOUND, TOO_MANY, FAILED, UNAVAILABLE = 400, 401, 404, 429, 500, 503
TYPES = {BAD_REQUEST: "invalid_request_error", NOT_FOUND: "invalid_request_error", TOO_MANY: "rate_limit_error"}


class ApiError(ServingError):
    """Answers a request with an HTTP status and OpenAI's error body."""

    def __init__(
        self, message: str, *, status: int = BAD_REQUEST, param: str | None = None, code: str | None = None
    ) -> None:
        super().__init__(message)
        self.status, self.param, self.code = status, param, code

    def body(self) -> dict[str, Any]:
        kind = TYPES.get(self.status, "invalid_request_error" if self.status < FAILED else "server_error")
        return {"error": {"message": str(self), "type": kind, "param": self.param, "code": self.code}}
