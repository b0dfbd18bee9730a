"""What every rank of a vLLM engine is given for a moment of counting: the operations that really ran, by name."""

from __future__ import annotations

from typing import Any

import torch


class OperationCounter:
    """Mixed into vLLM's workers (`worker_extension_cls`): eager and compiled passes are counted alike."""

    _bench_profile: Any = None

    def bench_count_begin(self) -> None:
        self._bench_profile = torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU])
        self._bench_profile.start()

    def bench_count_end(self) -> dict[str, int]:
        profile, self._bench_profile = self._bench_profile, None
        profile.stop()
        return {event.key: event.count for event in profile.key_averages()}
