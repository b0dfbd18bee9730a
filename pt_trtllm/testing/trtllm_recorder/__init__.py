"""A small recording implementation of the part of TensorRT-LLM 1.2 that `PTForCausalLM` uses.

Each module of this package stands for the module of TensorRT-LLM named in its docstring; `install` puts them in place.
Functions take exactly the arguments of the contract, so anything else raises. Building a model records a network: nodes
with an operation, inputs and the path of the module that made them. `evaluate` computes such networks.
It is written from the published behaviour of TensorRT-LLM's layers, and knows nothing of the PT decoder.
"""
