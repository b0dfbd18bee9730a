"""The command line's manners: one line for bad input, help for everything, both spellings."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from pt_trtllm import __version__
from pt_trtllm.cli.main import COMMANDS, cli
from pt_trtllm.errors import PtError
from pt_trtllm.testing.cli import check_cli, refusal, run_cli

pytestmark = pytest.mark.unit
MakeSource = Callable[..., Path]


def invoke(*args: object) -> Result:
    return CliRunner().invoke(cli, [str(arg) for arg in args])


@pytest.fixture
def engine_dir(make_source: MakeSource, tmp_path: Path) -> Path:
    """A small engine of one rank, without a tokenizer."""
    assert invoke("convert", "--model-dir", make_source(), "--output-dir", tmp_path / "checkpoint").exit_code == 0
    options = ("--max-seq-len", "32", "--max-input-len", "8")
    result = invoke("build", "--checkpoint-dir", tmp_path / "checkpoint", "--output-dir", tmp_path / "engine", *options)
    assert result.exit_code == 0, result.output
    return tmp_path / "engine"


def test_the_installed_command_works() -> None:
    for command in ([Path(sys.executable).parent / "pt-trtllm"], [sys.executable, "-m", "pt_trtllm.cli.main"]):
        version = subprocess.run([*command, "--version"], capture_output=True, text=True, timeout=240, check=True)
        assert version.stdout == f"pt-trtllm, version {__version__}\n"
        wrong = subprocess.run([*command, "no-such-command"], capture_output=True, text=True, timeout=240, check=False)
        assert (wrong.returncode, wrong.stdout) == (2, "")
        assert wrong.stderr.startswith("pt-trtllm: error: No such command 'no-such-command'")


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help(command: str) -> None:
    result = invoke(command, "--help")
    assert result.exit_code == 0
    assert "Usage:" in result.output


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (("convert",), "Missing option '--model-dir'"),
        (("convert", "--model-dir", "/nonexistent", "--output-dir", "x"), "'/nonexistent' does not exist"),
        (("build", "--checkpoint-dir", ".", "--output-dir", "x", "--backend", "tpu"), "'tpu' is not one of"),
        (("convert", "--model-dir", ".", "--output-dir", "x", "--quantization", "fp4"), "not one of 'none', 'int8_wo'"),
        (("frobnicate",), "No such command 'frobnicate'. The commands are convert, build, run"),
        (("biuld",), "No such command 'biuld'. Did you mean 'build'?"),
        (
            ("serve", "--model-repository", ".", "--gprc-port", "0"),
            "No such option '--gprc-port'. (Did you mean one of: '--grpc-port'",
        ),
        (("serve", "--model-repository", "."), "has no model (no */config.pbtxt); write one with pt-trtllm deploy"),
        (("client", "--prompt", "x", "--url", "http://127.0.0.1:8001"), "expected HOST:PORT"),
        (("run", "--no-such-option"), "No such option '--no-such-option'"),
    ],
)
def test_wrong_usage_is_one_line_and_exit_code_2(args: tuple[str, ...], message: str) -> None:
    assert message in refusal(*args)


def test_bad_input_is_one_line_and_exit_code_2(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "mamba"}')
    line = refusal("convert", "--model_dir", tmp_path, "--output_dir", tmp_path / "out")
    assert "model_type 'mamba' is none of the known formats (tamm, pt, llama)" in line


def test_a_folder_of_another_step_is_named_with_the_command_that_writes_the_right_one(
    engine_dir: Path, tmp_path: Path
) -> None:
    checkpoint, out = tmp_path / "checkpoint", ("--output-dir", tmp_path / "out")
    engine_wanted = "its manifest says 'checkpoint'; expected the engine that `pt-trtllm build` writes"
    for args, message in (
        (("run", "--engine-dir", checkpoint, "--prompt", "x"), engine_wanted),
        (("deploy", "--engine-dir", checkpoint, "--model-repository", tmp_path / "out"), engine_wanted),
        (("build", "--checkpoint-dir", engine_dir, *out), "expected the checkpoint that `pt-trtllm convert` writes"),
        (("build", "--checkpoint-dir", tmp_path / "source", *out), "no manifest.json; expected the checkpoint that"),
        (("convert", "--model-dir", checkpoint, *out), "holds what pt-trtllm has written (checkpoint)"),
    ):
        assert message in refusal(*args)
    assert not (tmp_path / "out").exists()


def test_two_outputs_in_one_file_are_refused_before_any_work(engine_dir: Path, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(tmp_path / "file")
    run = ("run", "--engine-dir", engine_dir, "--input-ids", "[[1]]")
    line = refusal(*run, "--output-json", tmp_path / "file", "--context-logits", tmp_path / "link")
    assert f"--output-json and --context-logits both write {tmp_path / 'link'}" in line
    bench = ("bench", "--engine-dir", engine_dir, "--json", tmp_path / "file")
    assert "--json and --trace both write" in refusal(*bench, "--trace", tmp_path / "file")
    assert not (tmp_path / "file").exists()


def test_what_the_serve_extra_brings_is_named_where_it_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "pt_trtllm.serving.client", raising=False)
    for name in ("tritonclient", "tritonclient.grpc"):
        monkeypatch.setitem(sys.modules, name, None)
    assert invoke("client", "--help").exit_code == 0
    error = invoke("client", "--prompt", "x").exception
    assert isinstance(error, PtError)
    assert "install it with: pip install 'pt-trtllm[serve]'" in str(error)


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ((), "give exactly one of --prompt, --input-ids and --input-file"),
        (("--input-ids", "[[1]]", "--prompt", "x"), "give exactly one of"),
        (("--input-ids", "[[1,"), "--input-ids: not valid JSON"),
        (("--input-ids", "{}"), "expected lists of token ids"),
        (("--input-ids", "[]"), "no prompt given"),
        (("--input-ids", '[["a"]]'), "expected a list of token ids"),
        (("--input-ids", "[[]]"), "the prompt is empty"),
        (("--input-ids", "[[1],[97]]"), "1: token id 97 is outside the vocabulary of 97"),
        (("--input-ids", "[[1,1,1,1,1,1,1,1,1]]"), "Prompt length (9) exceeds maximum input length (8)"),
        (("--prompt", "hello"), "without a tokenizer: give --tokenizer-dir, or prompts as --input-ids"),
        (("--input-ids", "[[1]]", "--max-new-tokens", "0"), "max_tokens is 0"),
        (("--input-ids", "[[1]]", "--top-p", "7"), "top_p is 7.0"),
        (
            ("--input-ids", "[[1]]", "--output-json", "/no/such/folder/x.json"),
            "the folder /no/such/folder does not exist",
        ),
    ],
)
def test_run_refuses_what_it_cannot_answer(engine_dir: Path, args: tuple[str, ...], message: str) -> None:
    result = invoke("run", "--engine-dir", engine_dir, *args)
    assert isinstance(result.exception, PtError), result.output
    assert message in str(result.exception)


def test_inspect_shows_sources_checkpoints_and_engines(engine_dir: Path, tmp_path: Path) -> None:
    source = json.loads(invoke("inspect", tmp_path / "source", "--json").output)
    assert source["sync_points_by_world_size"]["4"] == {"track_fusion": 2, "tensor_parallel": 0, "logits": 1}
    assert source["sync_points_by_world_size"]["8"]["tensor_parallel"] == 8
    checkpoint = json.loads(invoke("inspect", tmp_path / "checkpoint", "--json", "--tensors", "--verify").output)
    assert checkpoint["mapping"]["tracks_of_rank"] == [[0, 1, 2, 3]]
    assert checkpoint["tensors"]["rank0.safetensors"]["transformer.ln_f.weight"] == "F32 [64]"
    engine = json.loads(invoke("inspect", engine_dir, "--json").output)
    assert (engine["kind"], engine["backend"], engine["limits"]["max_input_len"]) == ("engine", "cpu", 8)
    assert "sync_plan:" in invoke("inspect", engine_dir).output


def test_inspect_verify_notices_a_changed_byte(engine_dir: Path) -> None:
    path = engine_dir / "rank0.engine"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    assert invoke("inspect", engine_dir).exit_code == 0
    assert "the file was changed" in str(invoke("inspect", engine_dir, "--verify").exception)


def test_doctor_lists_what_is_here_and_how_to_get_the_rest() -> None:
    findings = {finding["name"]: finding for finding in json.loads(check_cli("doctor", "--json").stdout)}
    assert findings["track-fusion library"]["found"].split()[0].endswith(".so")
    assert "Open MPI" in findings["MPI launcher"]["found"]
    assert all(finding["found"] or finding["how_to_get"] for finding in findings.values())


def test_doctor_takes_no_folder_for_vllm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "vllm").mkdir()
    monkeypatch.syspath_prepend(tmp_path)
    findings = {finding["name"]: finding for finding in json.loads(invoke("doctor", "--json").output)}
    assert findings["vllm"]["found"] == ""
    assert "pip install vllm" in findings["vllm"]["how_to_get"]


def test_doctor_reports_a_wrong_setting_instead_of_failing_on_it() -> None:
    done = run_cli("doctor", "--json", env={"PT_MPIRUN": "/nonexistent"})
    findings = {finding["name"]: finding for finding in json.loads(done.stdout)}
    assert done.returncode == 1
    assert "not an executable file" in findings["MPI launcher"]["how_to_get"]
