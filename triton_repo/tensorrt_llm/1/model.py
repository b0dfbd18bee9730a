"""Token ids to token ids, by an engine of several ranks; see pt_trtllm/serving/models/core.py."""

from pt_trtllm.serving.models.core import CoreModel as TritonPythonModel

__all__ = ["TritonPythonModel"]
