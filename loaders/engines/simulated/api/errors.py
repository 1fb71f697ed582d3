"""Errors as vLLM's server words them. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

_TYPES = {
    400: "BadRequestError",
    401: "AuthenticationError",
    404: "NotFoundError",
    500: "InternalServerError",
    501: "NotImplementedError",
    503: "ServiceUnavailableError",
}


class ApiError(Exception):
    """A request that is answered with an error; ``param`` is the field at fault, if any."""

    def __init__(self, status: int, message: str, *, param: str | None = None) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.param = param

    @property
    def type(self) -> str:
        """vLLM's name for this kind of error."""
        return _TYPES.get(self.status, "BadRequestError")

    def openai(self) -> dict[str, Any]:
        """The body on OpenAI's paths."""
        return {
            "error": {
                "message": self.message,
                "type": self.type,
                "param": self.param,
                "code": self.status,
            }
        }

    def anthropic(self) -> dict[str, Any]:
        """The body on Anthropic's paths."""
        return {"type": "error", "error": {"type": self.type, "message": self.message}}


def bad(message: str, param: str | None = None) -> ApiError:
    """A 400."""
    return ApiError(400, message, param=param)


def unknown_model(name: object, served: Sequence[str]) -> ApiError:
    """The 404 for a model that is not among those served."""
    message = f"The model `{name}` does not exist. Valid aliases: {', '.join(served)}."
    return ApiError(404, message, param="model")
