"""Ranks on several hosts: network namespaces of the test's own, joined by virtual cables, and MPI over TCP."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from safetensors.torch import load_file

from pt_trtllm.errors import ConfigError
from pt_trtllm.testing import hosts as hosts_module
from pt_trtllm.testing.cases import BASE
from pt_trtllm.testing.cli import check_cli
from pt_trtllm.testing.hosts import Hosts, check_available
from pt_trtllm.testing.numeric import FLOAT32_LOGITS, assert_close
from pt_trtllm.testing.reference import NUM_NEW_TOKENS, Reference, make_reference

pytestmark = pytest.mark.mpi

SMALL = ("--shape", "tiny", "--prompt-len", "8", "--batch-size", "2", "--output-len", "4", "--num-requests", "2")


@pytest.fixture(autouse=True)
def _can_make_hosts() -> None:
    try:
        check_available()
    except ConfigError as error:
        pytest.skip(str(error))


def namespaces_of(pid: int) -> list[str]:
    listed = subprocess.run(["ip", "netns", "list"], capture_output=True, text=True, timeout=120, check=True).stdout
    return [line for line in listed.splitlines() if line.startswith(f"pt{pid}-")]


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Reference:
    return make_reference(BASE, tmp_path_factory.mktemp("reference"))


def _run(hosts: Hosts, engine: Path, reference: Reference, tmp_path: Path) -> dict[str, object]:
    """`pt-trtllm run` over all hosts."""
    prompts = ("--input-ids", json.dumps(reference.prompts), "--max-new-tokens", NUM_NEW_TOKENS)
    files = ("--output-json", tmp_path / "out.json", "--context-logits", tmp_path / "logits.safetensors")
    with hosts.mpi():
        check_cli(
            "run", "--engine-dir", engine, "--hostfile", hosts.hostfile, *prompts, *files,
            env={"PT_COMM_TIMEOUT_S": "120"},
        )  # fmt: skip
    data: dict[str, object] = json.loads((tmp_path / "out.json").read_text())
    return data


@pytest.mark.parametrize(("world_size", "slots"), [(2, 1), (4, 2)])
def test_ranks_on_two_hosts_give_the_references_answers(
    reference: Reference, tmp_path: Path, world_size: int, slots: int
) -> None:
    options = ("--world-size", world_size)
    check_cli("convert", "--model-dir", reference.folder, "--output-dir", tmp_path / "c", *options)
    check_cli("build", "--checkpoint-dir", tmp_path / "c", "--output-dir", tmp_path / "e", "--max-seq-len", 64)
    with Hosts(2, slots=slots) as hosts:
        data = _run(hosts, tmp_path / "e", reference, tmp_path)
    assert [output["output_ids"] for output in data["outputs"]] == reference.continuations  # type: ignore[attr-defined]
    assert data["stats"]["hosts"] == 2  # type: ignore[index]
    assert data["stats"]["sync_points_per_forward"] == {  # type: ignore[index]
        "track_fusion": 2, "tensor_parallel": 0, "logits": 1,
    }  # fmt: skip
    logits = load_file(tmp_path / "logits.safetensors")
    for index, expected in enumerate(reference.logits):
        assert_close(logits[str(index)], expected, FLOAT32_LOGITS, f"prompt {index}")


def test_a_delayed_link_joins_all_hosts_and_leaves_nothing() -> None:
    with Hosts(3, delay_s=1e-3) as hosts:
        assert hosts.how in ("netem", "relay")
        assert hosts.round_trip_s() > 0
        hosts.set_delay(4e-3)
        assert hosts.round_trip_s() > 4e-3  # it was 2 ms; a busy machine can only add to it
        assert len(namespaces_of(os.getpid())) >= 3
    assert namespaces_of(os.getpid()) == []


@pytest.mark.parametrize("last", ["probe", "netem", "10.213.7.1", "10.213.7.2", "switch"])
def test_an_interruption_while_a_namespace_is_made_leaves_none(monkeypatch: pytest.MonkeyPatch, last: str) -> None:
    """Made, and its maker does not come to know."""
    run = hosts_module._run

    def interrupted(*command: str) -> str:
        output = run(*command)
        if command[:3] == ("ip", "netns", "add") and command[3].endswith(f"-{last}"):
            raise KeyboardInterrupt
        return output

    monkeypatch.setattr(hosts_module, "_run", interrupted)
    if last == "netem":  # asked only where there is a delay, and a tool for it
        monkeypatch.setattr(shutil, "which", lambda tool: f"/usr/sbin/{tool}")
        with pytest.raises(KeyboardInterrupt):
            hosts_module.has_netem()
    else:
        with pytest.raises(KeyboardInterrupt), Hosts(2):
            pass
    assert namespaces_of(os.getpid()) == []


@pytest.mark.timeout(900)
def test_bench_measures_every_engine_over_a_slower_link_too(tmp_path: Path) -> None:
    files = ("--json", tmp_path / "report.json", "--html", tmp_path / "report.html")
    options = ("--repeats", 1, "--link-delay", "50us")
    done = check_cli("bench", *SMALL, *options, *files, env={"TMPDIR": str(tmp_path)}, timeout_s=800)
    report = json.loads((tmp_path / "report.json").read_text())
    assert [link["delay"] for link in report["links"]] == ["50us"]
    for link in report["links"]:
        assert (link["complete"], link["repeats_done"]) == (True, 1)
        assert min(link["round_trip_us"]) > 0
        for engine, here in zip(link["engines"], report["engines"], strict=True):
            assert engine["name"] == here["name"]
            assert engine["collectives_per_pass"] == here["collectives_per_pass"]
            assert engine["tpot_ms"]["1"]["median"] > 0
    assert "50us (" in done.stdout
    assert "Over slower links" in (tmp_path / "report.html").read_text()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["report.html", "report.json"]


def test_an_interrupted_run_takes_its_namespaces_with_it(tmp_path: Path) -> None:
    options = ("--shape", "tiny", "--models", "pt", "--repeats", "1", "--num-requests", "0", "--link-delay", "1ms")
    process = subprocess.Popen(
        [sys.executable, "-m", "pt_trtllm.cli.main", "bench", *options],
        env={**os.environ, "TMPDIR": str(tmp_path)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        give_up = time.monotonic() + 240
        while len(namespaces_of(process.pid)) < 2 and time.monotonic() < give_up:
            assert process.poll() is None, process.stderr and process.stderr.read()
            time.sleep(0.1)
        process.send_signal(signal.SIGTERM)
        out, err = process.communicate(timeout=240)
    finally:
        process.kill()
        process.wait()
    assert (process.returncode, out, err.strip()) == (130, "", "")
    assert namespaces_of(process.pid) == []
    assert list(tmp_path.iterdir()) == []
