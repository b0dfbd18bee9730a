"""The TensorRT-LLM 1.2 backend: `PTForCausalLM` for its engine builder, C++ runtime and Triton backend."""
