"""Token ids to text; see pt_trtllm/serving/models/postprocess.py."""

from pt_trtllm.serving.models.postprocess import PostprocessModel as TritonPythonModel

__all__ = ["TritonPythonModel"]
