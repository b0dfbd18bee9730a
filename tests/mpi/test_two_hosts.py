"""Ranks on two hosts: network namespaces of the test's own, joined by a virtual cable, and MPI over TCP."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from safetensors.torch import load_file

from pt_trtllm.testing.cases import BASE
from pt_trtllm.testing.cli import check_cli
from pt_trtllm.testing.numeric import FLOAT32_LOGITS, assert_close
from pt_trtllm.testing.reference import NUM_NEW_TOKENS, Reference, make_reference

pytestmark = pytest.mark.mpi

# A remote shell that enters the other namespace, under a host name of its own.
AGENT = """#!/bin/sh
host="$1"; shift
exec ip netns exec "{prefix}-$host" unshare --uts sh -c 'hostname "$0" && exec sh -c "$1"' "$host" "$*"
"""


@dataclass(frozen=True)
class Hosts:
    """Two namespaces `PREFIX-ADDRESS`; the addresses serve as host names."""

    prefix: str
    addresses: tuple[str, str]

    def namespace(self, index: int) -> str:
        return f"{self.prefix}-{self.addresses[index]}"


def _ip(*args: str) -> None:
    subprocess.run(["ip", *args], check=True, capture_output=True, text=True, timeout=30)


@pytest.fixture(scope="module")
def hosts() -> Iterator[Hosts]:
    if os.geteuid() != 0 or not all(map(shutil.which, ("ip", "unshare", "hostname"))):
        pytest.skip("network namespaces need root, iproute2, util-linux and hostname")
    made = Hosts(f"pt{os.getpid()}", ("10.213.7.1", "10.213.7.2"))
    try:
        for index in range(2):
            _ip("netns", "add", made.namespace(index))
    except subprocess.CalledProcessError as error:
        pytest.skip(f"network namespaces cannot be made here: {error.stderr.strip()}")
    try:
        _ip("link", "add", "pt0", "netns", made.namespace(0), "type", "veth", "peer", "pt0", "netns", made.namespace(1))
        for index, address in enumerate(made.addresses):
            inside = ("-n", made.namespace(index))
            _ip(*inside, "addr", "add", f"{address}/24", "dev", "pt0")
            _ip(*inside, "link", "set", "pt0", "up")
            _ip(*inside, "link", "set", "lo", "up")
        yield made
    finally:
        for index in range(2):
            _ip("netns", "delete", made.namespace(index))


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Reference:
    return make_reference(BASE, tmp_path_factory.mktemp("reference"))


def _run(hosts: Hosts, engine: Path, slots: int, reference: Reference, tmp_path: Path) -> dict[str, object]:
    """`pt-trtllm run` on the first host, with a hostfile that names both."""
    (tmp_path / "agent").write_text(AGENT.format(prefix=hosts.prefix))
    (tmp_path / "agent").chmod(0o755)
    (tmp_path / "hosts").write_text("".join(f"{address} slots={slots}\n" for address in hosts.addresses))
    environment = {
        "PRTE_MCA_plm_ssh_agent": str(tmp_path / "agent"),
        "PRTE_MCA_prte_if_include": "pt0",
        "OMPI_MCA_pml": "ob1",
        "OMPI_MCA_btl": "tcp,self",
        "OMPI_MCA_btl_tcp_if_include": "pt0",
        "PT_COMM_TIMEOUT_S": "30",
    }
    command = ["ip", "netns", "exec", hosts.namespace(0), "unshare", "--uts", "sh", "-c", 'hostname "$0" && exec "$@"']
    command += [hosts.addresses[0], shutil.which("pt-trtllm") or "pt-trtllm", "run", "--engine-dir", str(engine)]
    command += ["--hostfile", str(tmp_path / "hosts"), "--input-ids", json.dumps(reference.prompts)]
    command += ["--max-new-tokens", str(NUM_NEW_TOKENS), "--output-json", str(tmp_path / "out.json")]
    command += ["--context-logits", str(tmp_path / "logits.safetensors")]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=170, check=False, env={**os.environ, **environment}
    )
    assert done.returncode == 0, done.stderr[-3000:]
    data: dict[str, object] = json.loads((tmp_path / "out.json").read_text())
    return data


@pytest.mark.parametrize(("world_size", "slots"), [(2, 1), (4, 2)])
def test_ranks_on_two_hosts_give_the_references_answers(
    hosts: Hosts, reference: Reference, tmp_path: Path, world_size: int, slots: int
) -> None:
    options = ("--world-size", world_size)
    check_cli("convert", "--model-dir", reference.folder, "--output-dir", tmp_path / "c", *options)
    check_cli("build", "--checkpoint-dir", tmp_path / "c", "--output-dir", tmp_path / "e", "--max-seq-len", 64)
    data = _run(hosts, tmp_path / "e", slots, reference, tmp_path)
    assert [output["output_ids"] for output in data["outputs"]] == reference.continuations  # type: ignore[attr-defined]
    assert data["stats"]["hosts"] == 2  # type: ignore[index]
    assert data["stats"]["sync_points_per_forward"] == {  # type: ignore[index]
        "track_fusion": 2, "tensor_parallel": 0, "logits": 1,
    }  # fmt: skip
    logits = load_file(tmp_path / "logits.safetensors")
    for index, expected in enumerate(reference.logits):
        assert_close(logits[str(index)], expected, FLOAT32_LOGITS, f"prompt {index}")
