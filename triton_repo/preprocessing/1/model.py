"""Text to token ids; see pt_trtllm/serving/models/preprocess.py."""

from pt_trtllm.serving.models.preprocess import PreprocessModel as TritonPythonModel

__all__ = ["TritonPythonModel"]
