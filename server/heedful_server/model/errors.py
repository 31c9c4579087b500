"""Why files cannot be served: refusals by name, and files that do not hold what they should.

Owns two exceptions about a model, both `ModelUnusable`, so that starting up treats them alike, and
one about an adapter, which only fails the request to load it. Raised while loading, in the engine
child or in a tool that reads weights; knows nothing of tensors.
"""

from heedful_server.errors import ModelUnusable, RequestError


class UnsupportedModel(ModelUnusable):
    """The model is intact but of a kind that is not served; the field is the key that says so."""

    def __init__(self, field: str, reason: str) -> None:
        self.field = field
        self.reason = reason
        super().__init__(f"{field}: {reason}")


class BadCheckpoint(ModelUnusable):
    """A file is missing or truncated, or holds other tensors than the configuration says."""


class BadAdapter(RequestError):  # noqa: N818 - named as its siblings in errors.py
    """An adapter is damaged, or of a kind or for a base that is not served; the message says which.

    It always names the file and the key or tensor.
    """
