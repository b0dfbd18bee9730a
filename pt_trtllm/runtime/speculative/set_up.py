"""Makes what guesses for an engine, as its options say. Called on all its ranks."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from pt_trtllm.comm.base import Communicator
from pt_trtllm.comm.local import LocalCommunicator
from pt_trtllm.engine.bundle import EngineConfig, open_bundle
from pt_trtllm.errors import ConfigError
from pt_trtllm.network.logits import Logits
from pt_trtllm.network.step import StepBatch
from pt_trtllm.runtime.core import Engine
from pt_trtllm.runtime.messages import encode
from pt_trtllm.runtime.opening import connect, open_engine
from pt_trtllm.runtime.options import RuntimeOptions
from pt_trtllm.runtime.speculative.config import SpeculativeConfig
from pt_trtllm.runtime.speculative.draft_model import DraftModel, Forward
from pt_trtllm.runtime.speculative.in_place import InPlaceProposer
from pt_trtllm.runtime.speculative.ngram import NgramProposer
from pt_trtllm.runtime.speculative.proposer import Proposer

DRAFT = 1
"""The draft's number among the engines that share the ranks."""


def open_proposer(engine: Engine, options: RuntimeOptions) -> tuple[Proposer | None, list[Engine]]:
    """(what guesses, on rank 0; the engines besides `engine` that this rank runs)"""
    config, comm = options.speculative, engine.comm
    if config is None:
        return None, []
    if config.method == "ngram":
        return NgramProposer(config.max_draft_len, config.max_matching_ngram_size), []
    assert config.draft_engine_dir is not None
    folder = Path(config.draft_engine_dir)
    draft_config, _ = open_bundle(folder)
    check_draft(draft_config, engine.config, config)
    ahead = config.max_draft_len * (2 if config.draft_placement == "own_ranks" else 1)
    own = dataclasses.replace(
        options,
        max_tokens_in_paged_kv_cache=0,
        speculative=None,
        trace_file="",
        fusion_codec="none",
        fusion_delta=False,
        guesses_ahead=ahead,
    )
    if config.draft_placement == "own_ranks":
        return (_own_ranks(folder, config, own) if comm.rank == 0 else None), []
    if draft_config.mapping.world_size == 1:
        if comm.rank:
            return None, []
        draft, own = open_engine(folder, draft_config, LocalCommunicator(), own)
        forward: Forward = alone(draft)
    else:
        draft, own = open_engine(folder, draft_config, connect(draft_config.mapping), own)
        forward = together(draft, comm, DRAFT)
    model = DraftModel(draft_config, own.kv_space(draft_config, shares_blocks=draft.shares_blocks), forward)
    return (InPlaceProposer(model, config.max_draft_len) if comm.rank == 0 else None), [draft]


def check_draft(draft: EngineConfig, target: EngineConfig, config: SpeculativeConfig) -> None:
    """Raises when the draft engine cannot guess for the target."""
    theirs, ours = draft.checkpoint.model.vocab_size, target.checkpoint.model.vocab_size
    if theirs != ours:
        raise ConfigError(f"the draft engine has a vocabulary of {theirs} tokens, expected the engine's own {ours}")
    ranks, world_size = draft.mapping.world_size, target.mapping.world_size
    if config.draft_placement == "in_place" and ranks not in (1, world_size):
        raise ConfigError(
            f"the draft engine is for {ranks} ranks; in place it needs 1 or {world_size}, as the engine. "
            "Build it for one of these, or give it own_ranks"
        )


def alone(draft: Engine) -> Forward:
    """Passes of a draft that only rank 0 runs."""

    def forward(batch: StepBatch) -> Logits:
        logits = draft.forward(batch)
        assert logits is not None
        return logits

    return forward


def together(draft: Engine, comm: Communicator, number: int) -> Forward:
    """Passes of a draft that runs on all ranks of `comm`, where it is engine `number`."""

    def forward(batch: StepBatch) -> Logits:
        comm.broadcast(encode(batch, number))
        logits = draft.forward(batch)
        assert logits is not None
        return logits

    return forward


def _own_ranks(folder: Path, config: SpeculativeConfig, options: RuntimeOptions) -> Proposer:
    from pt_trtllm.runtime.speculative.own_ranks import DraftWorld, OwnRanksProposer

    hostfile = Path(config.draft_hostfile) if config.draft_hostfile else None
    return OwnRanksProposer(DraftWorld(folder, options, hostfile), config.max_draft_len)
