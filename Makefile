.PHONY: help setup test lint fix demo bench clean
help:            ## list everything
	@grep -E '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*##/\t/'
setup:           ## make .venv with tests and tools
	@bash -c 'source scripts/setup.sh test dev serve rtx'
test:            ## lint, C++ tests, pytest
	@bash scripts/test.sh
lint:            ## style and types only
	@bash scripts/lint.sh
fix:             ## format everything
	@bash scripts/lint.sh --fix
demo:            ## from the example checkpoint to text
	@bash scripts/demo.sh
bench:           ## all CPU benchmarks: JSON and SUMMARY.md in build/bench, under 20 minutes
	@bash scripts/bench_all.sh
clean:           ## remove what was built (not the environment)
	@rm -rf build demo_output
