"""`torch.ops.pt_trtllm.track_fusion(x, group, op, residual, gamma, eps) -> (h, normed)` on CPU and CUDA.

A graph names the group that fuses, so a compiled one may be kept for the next process. The operator is there once this
module has been imported. It traces under torch.compile, writes to none of its inputs and returns new tensors; `normed`
is empty without gamma. Like every collective it must stay in the graph on all ranks or on none: use its result.
"""

# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import threading
import weakref
from typing import Any, Protocol

import torch

from pt_trtllm.errors import CommunicationError


class Fuser(Protocol):
    """Whatever fuses tracks: a group of this host's processors, or a channel between GPUs."""

    def fuse(
        self,
        x: torch.Tensor,
        *,
        op: str = "mean",
        residual: torch.Tensor | None = None,
        gamma: torch.Tensor | None = None,
        eps: float = 1e-5,
    ) -> tuple[torch.Tensor, torch.Tensor | None]: ...


_lock = threading.Lock()
"""Ranks may be threads."""
_fusers: weakref.WeakValueDictionary[str, Fuser] = weakref.WeakValueDictionary()


def register(name: str, fuser: Fuser) -> None:
    """Makes `fuser` the one that the operator calls by `name`, until it is forgotten or gone.

    Compiled graphs hold the name: choose one that the next process gives to the same group.
    """
    if not name:
        raise CommunicationError("track_fusion: the name of a group is empty")
    with _lock:
        if _fusers.get(name, fuser) is not fuser:
            raise CommunicationError(
                f"track_fusion: there is a group {name!r} already in this process; close it first, or take another name"
            )
        _fusers[name] = fuser


def forget(fuser: Fuser, name: str | None = None) -> None:
    """Takes all of its names from `fuser`, or one: others may have them now."""
    with _lock:
        for known in [known for known, holder in _fusers.items() if holder is fuser and name in (None, known)]:
            del _fusers[known]


def _track_fusion(
    x: torch.Tensor,
    group: str,
    op: str = "mean",
    residual: torch.Tensor | None = None,
    gamma: torch.Tensor | None = None,
    eps: float = 1e-5,
) -> tuple[torch.Tensor, torch.Tensor]:
    fuser = _fusers.get(group)
    if fuser is None:
        known = ", ".join(sorted(_fusers)) or "none"
        raise CommunicationError(f"track_fusion: there is no group {group!r} in this process, only these: {known}")
    # A compiler lays tensors out as it likes.
    residual = None if residual is None else residual.contiguous()
    h, normed = fuser.fuse(x.contiguous(), op=op, residual=residual, gamma=gamma, eps=eps)
    return h, x.new_empty(0) if normed is None else normed


def _track_fusion_fake(
    x: torch.Tensor,
    group: str,
    op: str = "mean",
    residual: torch.Tensor | None = None,
    gamma: torch.Tensor | None = None,
    eps: float = 1e-5,
) -> tuple[torch.Tensor, torch.Tensor]:
    h = x.new_empty(x.shape)
    if gamma is None:
        return h, x.new_empty(0)
    return h, x.new_empty(x.shape if gamma.dim() == 1 else (gamma.shape[0], *x.shape))


def _define() -> object:
    make_library: Any = torch.library.Library  # annotated in some of torch's stubs only
    library = make_library("pt_trtllm", "FRAGMENT")
    library.define(
        "track_fusion(Tensor x, str group, str op='mean', Tensor? residual=None, Tensor? gamma=None, float eps=1e-5)"
        " -> (Tensor, Tensor)",
        tags=(torch.Tag.pt2_compliant_tag,),
    )
    library.impl("track_fusion", _track_fusion, "CPU")
    library.impl("track_fusion", _track_fusion, "CUDA")
    torch.library.register_fake("pt_trtllm::track_fusion", _track_fusion_fake, lib=library)
    return library


_library = _define()
"""Unloading it would remove the operator."""
