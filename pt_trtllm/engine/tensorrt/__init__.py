"""The TensorRT backend: the PT decoder in TensorRT's native layers, one serialized engine per rank."""
