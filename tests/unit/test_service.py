"""Rank 0's loop with a real engine of one rank: whatever one request brings, the others get their answers."""

from __future__ import annotations

import contextlib
import json
import math
import os
import re
import socket
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from pt_trtllm.checkpoint.convert import ConvertOptions, convert
from pt_trtllm.comm.local import LocalCommunicator
from pt_trtllm.engine.build import BuildOptions, build
from pt_trtllm.engine.bundle import BuildLimits, open_bundle
from pt_trtllm.network.logits import Candidates, Logits, Row
from pt_trtllm.network.step import StepBatch
from pt_trtllm.runtime.core import Engine, EngineCore
from pt_trtllm.runtime.guided import Guides
from pt_trtllm.runtime.opening import open_engine
from pt_trtllm.runtime.options import RuntimeOptions
from pt_trtllm.runtime.params import SamplingParams
from pt_trtllm.runtime.protocol import Channel, Message, request_to_json
from pt_trtllm.runtime.request import Request
from pt_trtllm.runtime.sampling import Sampler
from pt_trtllm.runtime.service import Service
from pt_trtllm.runtime.tokenizer import Tokenizer

pytestmark = pytest.mark.unit

EXAMPLE = Path(__file__).parents[2] / "examples/tiny-pt"
AMBIGUOUS = "start: e\ne: e e | e e e | e e e e | f f | /[a-z ]/\nf: e e | f f | /[a-z ]/"
SOON_S = 120.0
PLAIN = Request(prompt_ids=(5, 6, 7), params=SamplingParams(max_tokens=12, ignore_eos=True))


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Engine:
    folder = tmp_path_factory.mktemp("service")
    convert(EXAMPLE, folder / "c", ConvertOptions(world_size=1, dtype="float32"))
    build(folder / "c", folder / "e", BuildOptions(limits=BuildLimits(max_batch_size=4, max_seq_len=160)))
    config, _ = open_bundle(folder / "e")
    return open_engine(folder / "e", config, LocalCommunicator(), RuntimeOptions())[0]


class Client:
    def __init__(self, channel: Channel) -> None:
        self._channel, self._messages = channel, iter(channel)
        self.events: list[tuple[int, Message]] = []
        """(id, what its last message said), in the order in which requests ended."""
        self.tokens: dict[int, list[int]] = {}
        self.extras: dict[int, Message] = {}
        self.first: list[int] = []
        """Whose first event came when."""

    def send(self, message: Message) -> None:
        self._channel.send(message)

    def submit(self, requests: dict[int, Message]) -> None:
        self.send({"type": "submit", "requests": list(requests.items())})

    def wait(self, *ids: int) -> None:
        """Until these have ended."""
        while not {*ids} <= {number for number, _ in self.events}:
            message = next(self._messages)
            if message["type"] == "refused":
                self.first += [message["id"]] * (message["id"] not in self.first)
                self.events.append((message["id"], message))
            for number, tokens, reason, extras in message.get("outputs", ()):
                self.first += [number] * (number not in self.first)
                self.tokens.setdefault(number, []).extend(tokens)
                self.extras[number] = {**self.extras.get(number, {}), **extras}
                if reason:
                    self.events.append((number, {"reason": reason}))

    def end(self, number: int) -> Message:
        return dict(self.events)[number]

    def stats(self) -> Message:
        self.send({"type": "stats"})
        return next(dict(message["stats"]) for message in self._messages if message["type"] == "stats")


class Running:
    """A service in a thread, which says so when it ends by an exception."""

    def __init__(self, engine: Engine, folder: Path, options: RuntimeOptions | None = None) -> None:
        ours, theirs = socket.socketpair()
        self.core = EngineCore(engine, options or RuntimeOptions(), Tokenizer(EXAMPLE))
        self._service, self._theirs = Service(self.core, Channel(theirs), folder), theirs
        self.client = Client(Channel(ours))
        self.failure: BaseException | None = None
        self._thread = threading.Thread(target=self._run)

    def _run(self) -> None:
        try:
            self._service.run()
        except BaseException as error:
            self.failure = error
        finally:
            self._theirs.shutdown(socket.SHUT_RDWR)  # the client's wait ends

    def __enter__(self) -> Client:
        self._thread.start()
        return self.client

    def __exit__(self, *exc: object) -> None:
        if self._thread.is_alive() and exc == (None, None, None):
            assert self.client.stats()["kv_blocks_used"] == 0
        self.client.send({"type": "shutdown"})
        self._thread.join()
        assert self.failure is None


@pytest.fixture
def client(engine: Engine, tmp_path: Path) -> Iterator[Client]:
    with Running(engine, tmp_path) as client:
        yield client


@pytest.fixture(scope="module")
def expected(engine: Engine, tmp_path_factory: pytest.TempPathFactory) -> list[int]:
    with Running(engine, tmp_path_factory.mktemp("plain")) as client:
        client.submit({0: request_to_json(PLAIN)})
        client.wait(0)
        return client.tokens[0]


def asked(**changes: Any) -> Message:
    """A request as it goes over the wire, with what no honest client sends."""
    request = request_to_json(PLAIN)
    params = {**request["params"], **changes.pop("params", {})}
    return json.loads(json.dumps({**request, "params": params, **changes}))  # type: ignore[no-any-return]


@pytest.mark.parametrize(
    "hostile",
    [
        asked(params={"repetition_penalty": 1e-39}),
        asked(params={"repetition_penalty": 1e300}),
        asked(params={"repetition_penalty": 10**400}),
        asked(params={"temperature": 10**400}),
        asked(params={"stop_token_ids": [-1_000_000], "min_tokens": 5}),
        asked(params={"bad_words_ids": [[-1_000_000]]}),
        asked(params={"logit_bias": {"999999": 1}}),
        asked(params={"guided_regex": "("}),
        asked(params={"guided_grammar": AMBIGUOUS}),
        asked(params={"nonsense": 1}),
        {**asked(), "params": []},
        asked(prompt_ids=[]),
        asked(prompt_ids=[10**9]),
        asked(prompt_ids=[-1]),
        asked(prompt_ids=["x"]),
        asked(prompt_ids=[1.5]),
        asked(prompt_ids=None),
        asked(prompt_ids=[1] * 5000),
        asked(priority=math.nan),
        asked(priority="high"),
        {},
    ],
    ids=lambda request: json.dumps(request)[-60:],
)
def test_no_request_harms_another(client: Client, expected: list[int], hostile: Message) -> None:
    client.submit({0: asked(), 1: hostile, 2: asked()})
    client.wait(0, 1, 2)
    assert client.tokens[0] == client.tokens[2] == expected
    refused = client.end(1)
    assert refused["type"] == "refused"
    assert len(refused["message"].splitlines()) == 1
    assert not re.search(r"Traceback|\.py|/(srv|root|usr|home|tmp|work)", refused["message"])


@pytest.mark.parametrize(
    "malformed",
    [
        {}, [], 3, {"type": "what"}, {"type": "submit"}, {"type": "submit", "requests": [[1]]},
        {"type": "submit", "requests": [[[], asked()]]}, {"type": "cancel"}, {"type": "cancel", "id": []},
    ],
)  # fmt: skip
def test_malformed_messages_are_ignored(client: Client, expected: list[int], malformed: Any) -> None:
    client.submit({0: asked()})
    client.send(malformed)
    client.submit({2: asked()})
    client.wait(0, 2)
    assert client.tokens[0] == client.tokens[2] == expected


def test_an_error_while_drawing_ends_that_sequence_alone(
    client: Client, expected: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    draw = Sampler._draw

    def fail(self: Sampler, logits: torch.Tensor | Candidates) -> int:
        if self.params.seed == 666 and self._generator.get_state().sum() >= 0:
            raise RuntimeError("in /srv/secret/file.py")
        return draw(self, logits)

    monkeypatch.setattr(Sampler, "_draw", fail)
    client.submit({0: asked(), 1: asked(params={"temperature": 1.0, "seed": 666}), 2: asked()})
    client.wait(0, 1, 2)
    assert client.tokens[0] == client.tokens[2] == expected
    assert client.end(1)["kind"] == "failed"
    assert client.end(1)["message"] == ("the engine could not continue this request (RuntimeError); its log has more")


class Broken:
    """An engine whose rows are not finite from the third step on, for sequences in slots above the first."""

    def __init__(self, engine: Engine) -> None:
        self._engine, self._steps = engine, 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._engine, name)

    def forward(self, batch: StepBatch) -> Logits:
        logits = self._engine.forward(batch)
        assert logits is not None
        self._steps += 1
        if self._steps < 3 or len(logits.rows) < 2:
            return logits
        return Logits([logits.rows[0], *map(_nan, logits.rows[1:])], finite=False)


def _nan(row: Row) -> Row:
    if isinstance(row, int):
        return -1
    if isinstance(row, Candidates):
        return Candidates(row.values * math.nan, row.tokens, row.first)
    return row * math.nan


@pytest.mark.parametrize("params", [{}, {"temperature": 1.0, "top_k": 5}, {"temperature": 1.0}])
def test_rows_that_are_not_finite_end_their_own_sequence(
    engine: Engine, expected: list[int], tmp_path: Path, params: dict[str, Any]
) -> None:
    with Running(Broken(engine), tmp_path) as client:
        client.submit({0: asked(), 1: asked(params=params)})
        client.wait(0, 1)
        assert client.tokens[0] == expected
        assert len(client.tokens[1]) == 2
        assert client.end(1)["kind"] == "failed"
        assert "not finite" in client.end(1)["message"]


@contextlib.contextmanager
def small_disk(folder: Path) -> Iterator[Path]:
    """A file system of 16 KiB. It has no name, so that nothing of it stays, however a test ends."""
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=16k", "tmpfs", folder], check=False).returncode:
        pytest.skip("only root may mount a small file system")
    root = os.open(folder, os.O_RDONLY)
    try:
        subprocess.run(["umount", "--lazy", folder], check=True)
        yield Path(f"/proc/self/fd/{root}")
    finally:
        os.close(root)


@pytest.mark.parametrize("disk", ["missing", "full"])
def test_a_disk_that_takes_no_logits_fails_who_asked_for_them(
    engine: Engine, expected: list[int], tmp_path: Path, disk: str
) -> None:
    with small_disk(tmp_path) if disk == "full" else contextlib.nullcontext(tmp_path / "missing") as folder:
        with Running(engine, folder) as client:
            client.submit({0: asked(), 1: asked(context_logits=True), 2: asked()})
            client.wait(0, 1, 2)
            assert client.tokens[0] == client.tokens[2] == expected
            assert client.end(1)["kind"] == "failed"
            reason = "No space left on device" if disk == "full" else "No such file or directory"
            assert client.end(1)["message"] == f"the prompt's logits could not be kept: {reason}"
        assert not list(folder.glob("*"))


def test_log_probabilities_of_a_prompt_outlive_a_preemption(engine: Engine, tmp_path: Path) -> None:
    options = RuntimeOptions(scheduler_policy="max_utilization", max_tokens_in_paged_kv_cache=128)
    with Running(engine, tmp_path, options) as client:
        prompt = [5 + index % 7 for index in range(64)]
        request = asked(prompt_ids=prompt, params={"prompt_logprobs": 0})
        client.submit({0: request, 1: request})
        client.wait(0, 1)
        assert client.stats()["preemptions"] >= 1
        assert [len(client.extras[number]["prompt_logprobs"]) for number in (0, 1)] == [63, 63]


def test_a_grammar_that_takes_long_holds_up_its_own_answer_alone(client: Client, expected: list[int]) -> None:
    grammar = "root ::= " + " | ".join(f'"a{index}"' for index in range(20_000))
    client.submit({0: asked(params={"guided_grammar": grammar}), 1: asked(), 2: asked()})
    client.wait(0, 1, 2)
    assert client.tokens[1] == client.tokens[2] == expected
    assert [number for number, _ in client.events][-1] == 0
    assert client.first[-1] == 0


def test_who_waits_for_a_grammar_can_leave(client: Client, expected: list[int]) -> None:
    grammar = "root ::= " + " | ".join(f'"b{index}"' for index in range(20_000))
    client.submit({0: asked(params={"guided_grammar": grammar})})
    client.send({"type": "cancel", "id": 0})
    client.submit({1: asked()})
    client.wait(0, 1)
    assert client.end(0) == {"reason": "cancelled"}
    assert client.tokens[1] == expected


def test_waiting_for_grammars_alone_is_progress(engine: Engine) -> None:
    """Whoever watches the engine is not to take it for one that hangs."""
    core = EngineCore(engine, RuntimeOptions(), Tokenizer(EXAMPLE))
    grammar = "root ::= " + " | ".join(f'"c{index}"' for index in range(20_000))
    sequence = core.add(Request(prompt_ids=(5,), params=SamplingParams(guided_grammar=grammar)))
    passes = core.stats().forward_passes
    while sequence.paused:
        before = core.num_steps
        core.step()
        assert core.num_steps == before + 1
    assert core.num_steps > passes + 1
    core.cancel(sequence)
    assert core.stats().kv_blocks_used == 0


def test_grammars_that_take_long_hold_no_place_in_the_batch_and_are_left_with_their_clients(
    client: Client, expected: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    compile_grammar, begun, may_go_on = Guides._compile, list[str](), threading.Event()

    def compile_slowly(self: Guides, name: str, text: str) -> Any:
        begun.append(text)
        assert may_go_on.wait(SOON_S)
        return compile_grammar(self, name, text)

    monkeypatch.setattr(Guides, "_compile", compile_slowly)
    slow = range(8)  # twice as many as the batch has places
    client.submit({number: asked(params={"guided_regex": f"a{number}"}) for number in slow})
    client.submit({8: asked()})
    client.wait(8)
    assert client.tokens[8] == expected
    for number in slow[1:]:
        client.send({"type": "cancel", "id": number})
    client.wait(*slow[1:])
    may_go_on.set()
    client.submit({9: asked(params={"guided_regex": "b"})})
    client.wait(0, 9)
    assert begun == ["a0", "b"]
