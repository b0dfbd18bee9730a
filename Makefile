.PHONY: help setup test lint fix demo bench clean
help:            ## list everything
	@grep -E '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*##/\t/'
setup:           ## make .venv with tests and tools
	@bash -c 'source scripts/setup.sh test dev'
test:            ## lint, C++ tests, pytest
	@bash scripts/test.sh
lint:            ## style and types only
	@bash scripts/lint.sh
fix:             ## format everything
	@bash scripts/lint.sh --fix
demo:            ## from the example checkpoint to text
	@bash scripts/demo.sh
bench:           ## the measurements of docs/benchmarks.md
	@bash -c 'source scripts/setup.sh test dev && for b in pipeline numerics track_fusion; do python scripts/bench_$$b.py; done'
clean:           ## remove what was built (not the environment)
	@rm -rf build demo_output
