"""vLLM over several hosts without Ray: every rank is a process that we start, and all run the same requests."""

from __future__ import annotations

from typing import Any


def over_tcp(address: str, rank: int) -> type[Any]:
    """vLLM's executor for external launchers, told where to meet; `address` is host:port of rank 0.

    Where all ranks find the same name for their group, vLLM takes shared memory, whatever hosts they are on. It makes
    the name of the address's end, so each rank writes that differently, and gloo over TCP remains.
    """
    from vllm.v1.executor.uniproc_executor import ExecutorWithExternalLauncher

    class OverTcp(ExecutorWithExternalLauncher):  # type: ignore[misc]  # untyped where there is no vLLM
        def _distributed_args(self) -> tuple[str, int, int]:
            return f"tcp://{address}?host={rank}", rank, 0

    return OverTcp
