"""Track fusion on GPUs (``plugins/src/cuda_fusion``), bound: one rank's end of a channel.

Nothing of CUDA is imported here; torch tells the current stream when a tensor lives on a GPU.
"""

# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import ctypes
from types import TracebackType

import torch

from pt_trtllm.comm import torch_operator
from pt_trtllm.comm.coding import NO_CODING, Coding
from pt_trtllm.comm.cuda_abi import ALGORITHMS, PROVIDERS, REDUCTIONS, AllGather, Arguments, Config, check, load_library
from pt_trtllm.comm.exchange import Exchange
from pt_trtllm.comm.library import DTYPES
from pt_trtllm.comm.track_fusion import found
from pt_trtllm.errors import CommunicationError


class CudaFusion:
    """One rank's end of a channel between GPUs. All ranks fuse in the same order with the same sizes.

    `fuse` enqueues on the tensor's current stream, copies and synchronises nothing, and may be captured into a CUDA
    graph. Capture after one call of the same shape, and keep to one stream order. A wait that takes too long ends the
    channel on all ranks; the next call, or `check_status` after a synchronisation, raises `CommunicationError`.

    Provider "host_threads" runs the same protocols on CPU tensors of threads, without a GPU.
    """

    def __init__(
        self,
        *,
        rank: int,
        size: int,
        exchange: Exchange,
        provider: str = "cuda_ipc",
        device: int = -1,
        timeout_s: float = 10.0,
        num_blocks: int = 0,
        one_shot_bytes: int = 0,
        pull_bytes: int = 0,
        two_shot_bytes: int = 0,
        staging_bytes: int = 0,
        use_nccl: bool = True,
        strict_order: bool = False,
        use_nvls: bool = False,
    ) -> None:
        """Collective. Zero sizes take the defaults for `size` ranks; all but `rank` and `device` are equal on all.

        `use_nvls` makes the multicast memory that algorithm "nvls" needs, and fails on all ranks where one has none.
        """
        if provider not in PROVIDERS:
            raise CommunicationError(f"provider is {provider!r}, expected one of {', '.join(PROVIDERS)}")
        self._library = load_library()
        self._exchange = exchange
        self._failure: BaseException | None = None
        self._names: list[str] = []
        self._callback = AllGather(self._all_gather)  # called again when the channel is closed
        self.rank, self.size, self.provider = rank, size, provider
        config = Config(
            struct_bytes=ctypes.sizeof(Config),
            size=size,
            rank=rank,
            provider=PROVIDERS[provider],
            device=device,
            num_blocks=num_blocks,
            one_shot_bytes=one_shot_bytes,
            pull_bytes=pull_bytes,
            two_shot_bytes=two_shot_bytes,
            staging_bytes=staging_bytes,
            timeout_s=timeout_s,
            use_nccl=use_nccl,
            strict_order=strict_order,
            use_nvls=use_nvls,
        )
        pointer = ctypes.c_void_p()
        self._finish(
            self._library.pt_cuda_fusion_open(ctypes.byref(config), self._callback, None, ctypes.byref(pointer))
        )
        self._pointer: ctypes.c_void_p | None = pointer

    def fuse(
        self,
        x: torch.Tensor,
        *,
        op: str = "mean",
        residual: torch.Tensor | None = None,
        gamma: torch.Tensor | None = None,
        eps: float = 1e-5,
        algorithm: str = "auto",
        coding: Coding = NO_CODING,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """h = mean or sum over ranks of x [..., hidden] (+ residual), and its RMSNorm when `gamma` is given.

        gamma [hidden] gives normed like x, gamma [num_gammas, hidden] gives [num_gammas, ..., hidden]; its type is x's
        or float32. The residual is this rank's own.

        With a codec, codes and scales travel, rounded as `coding.algorithm` says: once by "one_shot" (here one_shot or
        pull, by size), twice by "two_shot", with the bits of `ShmGroup.fuse`; "auto" rounds large messages of three
        ranks and more twice. `coding.delta` needs the mean and a residual, the same on all ranks: x - residual travels,
        h is the mean of x.

        Algorithm "nvls" is never chosen by "auto": the switch adds, so all ranks get the same bits, but the same call
        may give others the next time.
        """
        if algorithm == "auto":
            algorithm = {"auto": "auto", "one_shot": "encode_once", "two_shot": "two_shot"}[coding.algorithm]
        hidden = self._check(x, residual, gamma, op, algorithm)
        h = torch.empty_like(x)
        normed = None
        if gamma is not None:
            normed = x.new_empty(x.shape if gamma.dim() == 1 else (gamma.shape[0], *x.shape))
        arguments = Arguments(
            struct_bytes=ctypes.sizeof(Arguments),
            dtype=DTYPES[x.dtype],
            reduction=REDUCTIONS[op],
            algorithm=ALGORITHMS[algorithm],
            tokens=x.numel() // hidden if hidden else 0,
            hidden=hidden,
            x=x.data_ptr(),
            residual=None if residual is None else residual.data_ptr(),
            h=h.data_ptr(),
            gamma=None if gamma is None else gamma.data_ptr(),
            norm_out=None if normed is None else normed.data_ptr(),
            num_gammas=0 if gamma is None else gamma.numel() // hidden,
            gamma_dtype=DTYPES[x.dtype if gamma is None else gamma.dtype],
            eps=eps,
            codec=coding.codec_number,
            delta=coding.delta,
        )
        stream = torch.cuda.current_stream(x.device).cuda_stream if x.is_cuda else None
        self.launch(arguments, stream)
        return h, normed

    def launch(self, arguments: Arguments, stream: int | None) -> None:
        """The call itself, for those who have pointers and a stream instead of tensors."""
        self._finish(self._library.pt_cuda_fusion_fuse(self._pointer, ctypes.byref(arguments), stream))

    def check_status(self) -> None:
        """Raises what ended the channel, if anything did. Does not wait: synchronise with the stream first."""
        self._finish(self._library.pt_cuda_fusion_status(self._pointer))

    def register(self, name: str) -> None:
        """Makes the channel known to the torch operator `pt_trtllm::track_fusion` and to TensorRT plugins by `name`, in
        this process and until it is closed."""
        torch_operator.register(name, self)
        try:
            check(self._library.pt_cuda_fusion_register(name.encode(), self._pointer))
        except CommunicationError:
            torch_operator.forget(self, name)
            raise
        self._names.append(name)

    def abort(self) -> None:
        """Ends the waits of all ranks, now and later. From any thread."""
        self._finish(self._library.pt_cuda_fusion_abort(self._pointer))

    def close(self) -> None:
        """Collective: nobody frees memory that another rank still maps. A second call does nothing."""
        if self._pointer is None:
            return
        torch_operator.forget(self)
        for name in self._names:
            self._library.pt_cuda_fusion_register(name.encode(), None)
        pointer, self._pointer = self._pointer, None
        self._finish(self._library.pt_cuda_fusion_close(pointer))

    def __enter__(self) -> CudaFusion:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if error is None:
            self.close()
        elif self._pointer is not None:
            # Peers may be gone: a collective close could wait for them. Memory goes with the process.
            self.abort()

    def _all_gather(self, _context: int, send: int, receive: int, num_bytes: int) -> int:
        try:
            parts = self._exchange(ctypes.string_at(send, num_bytes))
            whole = b"".join(parts)
            if len(parts) != self.size or len(whole) != self.size * num_bytes:
                raise CommunicationError(
                    f"the exchange returned {len(parts)} parts and {len(whole)} bytes, expected {self.size} parts of "
                    f"{num_bytes}"
                )
            ctypes.memmove(receive, whole, len(whole))
        except BaseException as error:  # must not unwind through C; raised again by _finish
            self._failure = error
            return 1
        return 0

    def _finish(self, status: int) -> None:
        failure, self._failure = self._failure, None
        if failure is not None:
            raise failure
        check(status)

    def _check(
        self, x: torch.Tensor, residual: torch.Tensor | None, gamma: torch.Tensor | None, op: str, algorithm: str
    ) -> int:
        place = "cpu" if self.provider == "host_threads" else "cuda"
        if x.dtype not in DTYPES or not x.is_contiguous() or x.device.type != place or x.dim() == 0:
            raise CommunicationError(
                f"fuse: x is {found(x)}, expected float32, bfloat16 or float16, at least one dimension, contiguous on "
                f"{place}"
            )
        if op not in REDUCTIONS or algorithm not in ALGORITHMS:
            raise CommunicationError(
                f"fuse: op is {op!r} and algorithm {algorithm!r}, expected one of {', '.join(REDUCTIONS)} and one of "
                f"{', '.join(ALGORITHMS)}"
            )
        hidden = x.shape[-1]
        like_x = residual is None or (
            residual.dtype == x.dtype
            and residual.shape == x.shape
            and residual.device == x.device
            and residual.is_contiguous()
        )
        if residual is not None and not like_x:
            raise CommunicationError(f"fuse: residual is {found(residual)}, expected it like x: {found(x)}")
        if gamma is not None and not (
            gamma.dtype in (x.dtype, torch.float32)
            and 1 <= gamma.dim() <= 2
            and gamma.shape[-1] == hidden
            and gamma.numel() > 0
            and gamma.device == x.device
            and gamma.is_contiguous()
        ):
            raise CommunicationError(
                f"fuse: gamma is {found(gamma)}, expected [{hidden}] or [num_gammas, {hidden}] of x's type or float32, "
                f"contiguous on {x.device}"
            )
        return hidden
