"""What the API server answers instead of what was asked for."""

import json


class KubeError(Exception):
    """The API server refused a call, or did not answer it (status 0).

    KubeError
    |- NotFoundError: there is no such object
    |- ConflictError: the object exists already, or is another one than was meant
    |- NoAnswerError: there was none in time
    NameConflictError (no KubeError: nothing was refused, but a child's name is taken)
    """

    def __init__(self, status: int, message: str) -> None:
        super().__init__(f"{status}: {message}")
        self.status = status
        self.message = message


class NotFoundError(KubeError):
    """404."""


class ConflictError(KubeError):
    """409."""


class NoAnswerError(KubeError):
    """0: the API server was there, or not, and took too long."""


class NameConflictError(Exception):
    """An object with the name of a child belongs to something else.

    ``passing`` says that it will go by itself: it is being deleted, or belongs to an earlier run of the same name.
    """

    def __init__(self, message: str, *, passing: bool) -> None:
        super().__init__(message)
        self.passing = passing


def parse_error(status: int, data: bytes) -> KubeError:
    """What an answer with ``status`` 400 or more says."""
    try:
        message = str(json.loads(data)["message"])
    except (ValueError, KeyError, TypeError):
        message = data.decode(errors="replace")[:1000]
    kinds = {404: NotFoundError, 409: ConflictError}
    return kinds.get(status, KubeError)(status, message)
