"""How answers are guessed ahead."""

from __future__ import annotations

from dataclasses import dataclass

from pt_trtllm.config import problems_to_error

METHODS = ("ngram", "draft")
PLACEMENTS = ("in_place", "own_ranks")


@dataclass(frozen=True, kw_only=True)
class SpeculativeConfig:
    """Guess several tokens, compute them in one pass, keep those that plain decoding would have drawn.

    Answers are those of plain decoding, token by token, under every sampling option: guesses only make it faster.
    """

    method: str
    """ngram: what followed the latest words when they last stood in the text. draft: a smaller engine's answer."""
    max_draft_len: int = 4
    """Guesses per sequence and pass."""
    max_matching_ngram_size: int = 3
    """ngram: how many of the latest tokens to look for; fewer where so many are not found."""
    draft_engine_dir: str | None = None
    """draft: an engine with the same vocabulary; of one rank, or of as many as the engine it guesses for."""
    draft_placement: str = PLACEMENTS[0]
    """draft: in_place takes turns with the engine on its ranks; own_ranks guesses ahead while the engine verifies."""
    draft_hostfile: str | None = None
    """own_ranks: hosts of the draft engine's ranks, where there are several."""

    def __post_init__(self) -> None:
        problems = []
        if self.method not in METHODS:
            problems.append(f"method is {self.method!r}, expected one of {list(METHODS)}")
        if not 1 <= self.max_draft_len <= 64:
            problems.append(f"max_draft_len is {self.max_draft_len}, expected 1 to 64")
        if not 1 <= self.max_matching_ngram_size <= 16:
            problems.append(f"max_matching_ngram_size is {self.max_matching_ngram_size}, expected 1 to 16")
        if self.draft_placement not in PLACEMENTS:
            problems.append(f"draft_placement is {self.draft_placement!r}, expected one of {list(PLACEMENTS)}")
        if (self.method == "draft") != (self.draft_engine_dir is not None):
            problems.append(
                f"method is {self.method!r} with draft_engine_dir {self.draft_engine_dir!r}; expected a folder "
                "with method draft, none with ngram"
            )
        problems_to_error("speculative decoding", problems)
