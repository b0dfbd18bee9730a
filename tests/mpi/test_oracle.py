"""The numbers: every option, over 1 to 4 real MPI ranks, against the reference implementation."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from pt_trtllm.checkpoint.convert import ConvertOptions, convert
from pt_trtllm.engine.build import BuildOptions, build
from pt_trtllm.engine.bundle import BuildLimits
from pt_trtllm.mapping import sync_counts, sync_plan
from pt_trtllm.runtime.request import Request
from pt_trtllm.runtime.sampling import SamplingParams
from pt_trtllm.testing.cases import CASES, OUTGROWING, Case
from pt_trtllm.testing.jobs import Job, read_context_logits
from pt_trtllm.testing.numeric import FLOAT32_LOGITS, assert_close
from pt_trtllm.testing.ranks import run_jobs
from pt_trtllm.testing.reference import NUM_NEW_TOKENS, Reference, make_reference

pytestmark = pytest.mark.mpi

WORLD_SIZES = (1, 2, 3, 4)
# Two sequences at once and seven tokens per pass: prompts are chunked, mixed with decoding, and one has to wait.
LIMITS = BuildLimits(max_batch_size=2, max_seq_len=96, max_num_tokens=7)


@dataclass(frozen=True)
class Answer:
    results: dict[str, Any]
    logits: dict[str, torch.Tensor]
    plan: dict[str, int]


@pytest.fixture(scope="module")
def references(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Reference]:
    folder = tmp_path_factory.mktemp("references")
    return {
        case.name: make_reference(case.config, folder / case.name, prompt_lengths=case.prompt_lengths) for case in CASES
    }


@pytest.fixture(scope="module")
def answers(
    references: dict[str, Reference], tmp_path_factory: pytest.TempPathFactory
) -> dict[tuple[str, int], Answer]:
    """All cases of one world size run in one MPI world."""
    folder, answers = tmp_path_factory.mktemp("answers"), {}
    for world_size in WORLD_SIZES:
        jobs = {
            c.name: _prepare(c, world_size, references[c.name], folder) for c in CASES if world_size in c.world_sizes
        }
        run_jobs(world_size, [(job_dir / "engine", job_dir) for job_dir, _ in jobs.values()])
        for name, (job_dir, plan) in jobs.items():
            logits = read_context_logits(job_dir / "context_logits.safetensors")
            answers[name, world_size] = Answer(Job.read_results(job_dir), logits, plan)
    return answers


def _prepare(case: Case, world_size: int, reference: Reference, folder: Path) -> tuple[Path, dict[str, int]]:
    base = folder / f"{case.name}-{world_size}"
    checkpoint = convert(reference.folder, base / "checkpoint", ConvertOptions(source="tamm", world_size=world_size))
    build(base / "checkpoint", base / "engine", BuildOptions(limits=LIMITS))
    params = SamplingParams(max_tokens=NUM_NEW_TOKENS)
    requests = tuple(
        Request(prompt_ids=tuple(prompt), params=params, context_logits=True) for prompt in reference.prompts
    )
    Job(requests=requests).write(base)
    return base, sync_counts(sync_plan(checkpoint.model, checkpoint.mapping))


RUNS = [pytest.param(case, size, id=f"{case.name}-{size}") for case in CASES for size in case.world_sizes]


@pytest.mark.parametrize(("case", "world_size"), RUNS)
def test_logits_agree_with_the_reference(
    case: Case, world_size: int, references: dict[str, Reference], answers: dict[tuple[str, int], Answer]
) -> None:
    for index, expected in enumerate(references[case.name].logits):
        found = answers[case.name, world_size].logits[str(index)]
        assert_close(found, expected, FLOAT32_LOGITS, f"prompt {index}")


@pytest.mark.parametrize(("case", "world_size"), RUNS)
def test_greedy_continuations_are_the_references(
    case: Case, world_size: int, references: dict[str, Reference], answers: dict[tuple[str, int], Answer]
) -> None:
    outputs = answers[case.name, world_size].results["outputs"]
    assert [output["output_ids"] for output in outputs] == references[case.name].continuations


@pytest.mark.parametrize(("case", "world_size"), RUNS)
def test_counted_collectives_are_the_planned_ones(
    case: Case, world_size: int, answers: dict[tuple[str, int], Answer]
) -> None:
    answer = answers[case.name, world_size]
    assert answer.results["stats"]["sync_points_per_forward"] == answer.plan
    assert answer.results["stats"]["world_size"] == world_size


@pytest.mark.parametrize(("case", "world_size"), [run for run in RUNS if run.values[0].prompt_lengths == OUTGROWING])
def test_blocks_left_behind_are_given_back(case: Case, world_size: int, answers: dict[tuple[str, int], Answer]) -> None:
    stats = answers[case.name, world_size].results["stats"]
    assert stats["kv_blocks_left_behind"] > 0
    assert stats["kv_blocks_used"] == 0


def test_tracks_meet_l_over_d_times_and_tensor_parallelism_two_l_times(answers: dict[tuple[str, int], Answer]) -> None:
    assert answers["mixed_local_global_dense_sparse", 4].plan == {"track_fusion": 2, "tensor_parallel": 0, "logits": 1}
    assert answers["one_track_is_tensor_parallel", 2].plan == {"track_fusion": 0, "tensor_parallel": 8, "logits": 1}
    hybrid = answers["two_tracks_split_over_two_ranks_each", 4].plan
    assert hybrid == {"track_fusion": 2, "tensor_parallel": 8, "logits": 1}


def test_cases_span_every_option_of_the_reference() -> None:
    configs = [case.config for case in CASES]
    for option, values in {
        "tracks_combine_op": {None, "sum"},
        "scale_qk_norm": {None, False},
        "pre_norm": {"default", None, "pre_scale_rms_norm"},
        "post_norm": {None, "rms_norm", "pre_scale_rms_norm"},
        "pre_residual_norm": {None, "rms_norm"},
        "tracks_dispatch_norm": {None, "rms_norm"},
        "tracks_combine_norm": {None, "rms_norm", "pre_scale_rms_norm"},
        "num_kv_heads": {None, 1, 2},
    }.items():
        default = "default" if option == "pre_norm" else None
        assert values <= {config.get(option, default) for config in configs}, option
    assert {size for case in CASES for size in case.world_sizes} == {1, 2, 3, 4}
    assert len(CASES) >= 12
