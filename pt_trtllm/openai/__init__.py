"""A front end that speaks OpenAI's HTTP API to clients and Triton's gRPC streaming to the engine."""
