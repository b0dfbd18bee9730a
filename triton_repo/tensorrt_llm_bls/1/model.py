"""The whole chain as one Python model; see pt_trtllm/serving/models/bls.py."""

from pt_trtllm.serving.models.bls import BlsModel as TritonPythonModel

__all__ = ["TritonPythonModel"]
