"""Which scope each call needs.

Owns the one table from methods to scopes; a method that is missing from it cannot be served. What
a call may touch beyond that (whose answer, which project) is for the code that answers it. Plain
data.
"""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Final

from heedful_server.identity import (
    DEPLOY,
    ERASE,
    FEEDBACK_ANY,
    FEEDBACK_OWN,
    GENERATE,
    TRAIN,
)

# Needs a valid key and no scope in particular: whoever uses a model may know which one it is.
ANY_KEY: Final = ""

# Which one depends on the request, so the method looks again.
DEPLOY_OR_TRAIN: Final = f"{DEPLOY} or {TRAIN}"

_INFERENCE, _FEEDBACK, _MODELS = (
    f"/heedful.v1.{service}/" for service in ("InferenceService", "FeedbackService", "ModelService")
)

METHOD_SCOPES: Final[Mapping[str, str]] = MappingProxyType(
    {
        f"{_INFERENCE}Generate": GENERATE,
        f"{_INFERENCE}GenerateStream": GENERATE,
        f"{_INFERENCE}Score": GENERATE,
        f"{_INFERENCE}Tokenize": GENERATE,
        f"{_INFERENCE}Detokenize": GENERATE,
        f"{_INFERENCE}GetCompletion": FEEDBACK_OWN,
        f"{_FEEDBACK}Compare": GENERATE,
        f"{_FEEDBACK}SubmitFeedback": FEEDBACK_OWN,
        f"{_FEEDBACK}SubmitFeedbackBatch": FEEDBACK_OWN,
        f"{_FEEDBACK}RetractFeedback": FEEDBACK_OWN,
        f"{_FEEDBACK}GetFeedback": FEEDBACK_OWN,
        f"{_FEEDBACK}NextQuestion": FEEDBACK_OWN,
        f"{_FEEDBACK}ListFeedback": FEEDBACK_ANY,
        f"{_FEEDBACK}ExportFeedback": FEEDBACK_ANY,
        f"{_FEEDBACK}ImportFeedback": FEEDBACK_ANY,
        f"{_FEEDBACK}SummarizeFeedback": FEEDBACK_ANY,
        f"{_FEEDBACK}EraseUser": ERASE,
        f"{_MODELS}ListModels": ANY_KEY,
        f"{_MODELS}GetModel": ANY_KEY,
        f"{_MODELS}WatchDeployments": ANY_KEY,
        f"{_MODELS}Promote": DEPLOY,
        f"{_MODELS}RollBack": DEPLOY,
        f"{_MODELS}LoadAdapter": DEPLOY_OR_TRAIN,
        f"{_MODELS}UnloadAdapter": DEPLOY_OR_TRAIN,
        f"{_MODELS}StartRefresh": TRAIN,
        f"{_MODELS}GetRefresh": TRAIN,
        f"{_MODELS}WatchRefresh": TRAIN,
        f"{_MODELS}ListRefreshes": TRAIN,
        f"{_MODELS}ControlRefresh": TRAIN,
        f"{_MODELS}GetLoad": TRAIN,
    }
)
