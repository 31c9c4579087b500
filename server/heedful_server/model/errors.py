"""Why a checkpoint cannot be served: refusals by name, and files that do not hold what they should.

Owns two exception classes, both `ModelUnusable`, so that starting up treats them alike. Raised
while loading, in the engine child or in a tool that reads weights; knows nothing of tensors.
"""

from heedful_server.errors import ModelUnusable


class UnsupportedModel(ModelUnusable):
    """The model is intact but of a kind that is not served; the field is the key that says so."""

    def __init__(self, field: str, reason: str) -> None:
        self.field = field
        self.reason = reason
        super().__init__(f"{field}: {reason}")


class BadCheckpoint(ModelUnusable):
    """A file is missing or truncated, or holds other tensors than the configuration says."""
