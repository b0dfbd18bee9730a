"""How an engine is run, as opposed to what it was built for. The names are TensorRT-LLM's where it has one."""

from __future__ import annotations

import dataclasses
import json
from bisect import bisect_right
from dataclasses import dataclass

from pt_trtllm.comm.coding import ALGORITHMS, CODECS, Coding
from pt_trtllm.config import problems_to_error
from pt_trtllm.engine.bundle import EngineConfig
from pt_trtllm.engine.memory import available_bytes
from pt_trtllm.errors import ConfigError
from pt_trtllm.network.kv_cache import BLOCK_TOKENS, KV_CACHE_DTYPES, block_bytes, cache_type
from pt_trtllm.network.kv_groups import KvGroup, kv_groups
from pt_trtllm.runtime.kv_space import KvSpace
from pt_trtllm.runtime.scheduler import POLICIES
from pt_trtllm.runtime.speculative.config import SpeculativeConfig


@dataclass(frozen=True, kw_only=True)
class RuntimeOptions:
    max_tokens_in_paged_kv_cache: int = 0
    """Tokens that the KV cache holds; 0 takes what max_batch_size sequences of max_seq_len need, if memory allows."""
    kv_cache_free_mem_fraction: float = 0.5
    """Share of the host's available memory that the KV caches of its ranks may take together."""
    enable_block_reuse: bool = True
    """Prompts that start alike share the blocks of their common beginning."""
    kv_cache_dtype: str = KV_CACHE_DTYPES[0]
    """auto keeps keys and values in the activations' type; int8 takes about half the memory of 16 bits."""
    scheduler_policy: str = POLICIES[0]
    fusion_codec: str = CODECS[0]
    """How hidden states travel between ranks when tracks meet: as they are, or as codes of 8 or 4 bits."""
    fusion_delta: bool = False
    """Encode what a segment of layers changed, not the hidden state: smaller errors for the same bits."""
    fusion_algorithm: str = ALGORITHMS[0]
    """With a codec, one_shot rounds once, two_shot twice; auto takes two_shot for large steps of 3 and more ranks."""
    speculative: SpeculativeConfig | None = None
    """Guess several tokens per pass; the answers stay the same."""
    guesses_ahead: int = 0
    """Above 0, this engine does not answer but guesses for another one, so many tokens ahead of it."""
    trace_file: str = ""
    """The last steps of every rank are written here when the engine is closed, in Chrome's trace format."""

    def __post_init__(self) -> None:
        problems = []
        if self.max_tokens_in_paged_kv_cache < 0:
            problems.append(f"max_tokens_in_paged_kv_cache is {self.max_tokens_in_paged_kv_cache}, expected 0 or more")
        if not 0 < self.kv_cache_free_mem_fraction <= 1:
            problems.append(
                f"kv_cache_free_mem_fraction is {self.kv_cache_free_mem_fraction}, expected above 0, at most 1"
            )
        if self.kv_cache_dtype not in KV_CACHE_DTYPES:
            problems.append(f"kv_cache_dtype is {self.kv_cache_dtype!r}, expected one of {list(KV_CACHE_DTYPES)}")
        if self.scheduler_policy not in POLICIES:
            problems.append(f"scheduler_policy is {self.scheduler_policy!r}, expected one of {list(POLICIES)}")
        if self.fusion_codec not in CODECS:
            problems.append(f"fusion_codec is {self.fusion_codec!r}, expected one of {list(CODECS)}")
        if self.fusion_algorithm not in ALGORITHMS:
            problems.append(f"fusion_algorithm is {self.fusion_algorithm!r}, expected one of {list(ALGORITHMS)}")
        if self.fusion_delta and self.fusion_codec == "none":
            problems.append("fusion_delta is set, fusion_codec is 'none': without a codec nothing is rounded")
        problems_to_error("runtime options", problems)

    @property
    def fusion_coding(self) -> Coding:
        return Coding(codec=self.fusion_codec, delta=self.fusion_delta, algorithm=self.fusion_algorithm)

    def check(self, config: EngineConfig) -> None:
        """Raises when an engine cannot be run like this."""
        if self.fusion_codec != "none" and config.backend != "cpu":
            raise ConfigError(
                f"fusion_codec is {self.fusion_codec!r}; engines of backend {config.backend!r} fuse tracks as they "
                "were built to: leave it out"
            )
        if self.fusion_delta and config.checkpoint.model.combine_op != "mean":
            raise ConfigError(
                f"fusion_delta needs a model whose tracks are averaged; this one's combine_op is "
                f"{config.checkpoint.model.combine_op!r}: leave it out"
            )

    def num_blocks(self, config: EngineConfig) -> tuple[int, ...]:
        """Blocks of the KV cache, of each group of layers: for all its tokens, or what windows leave of them.

        Hosts may differ in memory, so rank 0 decides for all: see `settled`.
        """
        common = self._common_blocks(config)
        return tuple(
            common if group.window is None else min(common, self._most_blocks(config, group))
            for group in _groups(config)
        )

    def settled(self, config: EngineConfig) -> RuntimeOptions:
        """With the cache's size decided, so that every rank makes the same one."""
        return dataclasses.replace(self, max_tokens_in_paged_kv_cache=self._common_blocks(config) * BLOCK_TOKENS)

    def kv_space(self, config: EngineConfig, *, shares_blocks: bool) -> KvSpace:
        """Rank 0's plan of the cache, for an engine whose sequences can use the same blocks or not."""
        return KvSpace(
            _groups(config),
            self.num_blocks(config),
            BLOCK_TOKENS,
            step_tokens=config.limits.max_num_tokens,
            lead=self.guesses_ahead,
            reuse=self.enable_block_reuse and shares_blocks,
        )

    def _common_blocks(self, config: EngineConfig) -> int:
        """Blocks for all tokens of the cache, before what windows save."""
        if self.max_tokens_in_paged_kv_cache:
            return max(1, self.max_tokens_in_paged_kv_cache // BLOCK_TOKENS)
        groups, most = _groups(config), sum(_columns(config))
        if config.has_fixed_cache:
            return most
        budget = available_bytes() * self.kv_cache_free_mem_fraction
        costs = [(self._block_bytes_per_host(config, group), self._most_blocks(config, group)) for group in groups]

        def cost(common: int) -> int:
            return sum(block * min(common, limit) for block, limit in costs)

        return max(1, bisect_right(range(most + 1), budget, key=cost) - 1)

    def _most_blocks(self, config: EngineConfig, group: KvGroup) -> int:
        """What as many sequences as there can be, each as long as it can be, hold at once."""
        return group.most_blocks(_columns(config), BLOCK_TOKENS, config.limits.max_num_tokens, self.guesses_ahead)

    def _block_bytes_per_host(self, config: EngineConfig, group: KvGroup) -> int:
        """One block on all ranks, as if they shared one host."""
        dtype = cache_type(self.kv_cache_dtype, config.checkpoint.torch_dtype)
        return config.mapping.world_size * block_bytes(config.checkpoint.model, config.mapping, dtype, group)

    def to_bytes(self) -> bytes:
        return json.dumps(dataclasses.asdict(self)).encode()

    @classmethod
    def from_bytes(cls, data: bytes) -> RuntimeOptions:
        values = json.loads(data)
        if values["speculative"] is not None:
            values["speculative"] = SpeculativeConfig(**values["speculative"])
        return cls(**values)


def _groups(config: EngineConfig) -> tuple[KvGroup, ...]:
    if config.has_fixed_cache:  # it is as long as the longest sequence in every layer
        return (KvGroup(None, tuple(range(config.checkpoint.model.num_hidden_layers))),)
    return kv_groups(config.checkpoint.model, config.limits.max_seq_len)


def _columns(config: EngineConfig) -> list[int]:
    """Of the block tables of all sequences at their longest."""
    return [-(-config.limits.max_seq_len // BLOCK_TOKENS)] * config.limits.max_batch_size
