"""One request as a client of each door sees it, told as exactly one ending."""

from __future__ import annotations

import http.client
import json
import time
import uuid
from collections.abc import Generator
from contextlib import closing

from pt_trtllm.errors import ServingError
from pt_trtllm.runtime.params import SamplingParams
from pt_trtllm.runtime.tokenizer import Tokenizer
from pt_trtllm.serving.client import Client
from pt_trtllm.testing.soak.requests import CORE, OPENAI, Ending, Plan
from pt_trtllm.testing.soak.service import KeptService

ANSWER_S = 60.0
"""The server ends a request at this age; a client that hears nothing for longer counts it as lost."""
LOST_S = 180.0
LATER = (429, 503)
"""HTTP's words for a server that may take the request later."""


class SoakClient:
    """One of many; keeps a connection to the server it last reached."""

    def __init__(self, service: KeptService, tokenizer: Tokenizer) -> None:
        self._service, self._tokenizer = service, tokenizer
        self._clients: dict[str, Client] = {}

    def close(self) -> None:
        for client in self._clients.values():
            client.close()
        self._clients.clear()

    def ask(self, plan: Plan) -> Ending:
        """One attempt."""
        began, request_id = time.monotonic(), f"soak-{plan.number}-{uuid.uuid4().hex[:8]}"
        num_tokens, num_ends, how, text = 0, 0, "", ""
        try:
            pieces = self._openai(plan, request_id) if plan.path == OPENAI else self._triton(plan, request_id)
            with closing(pieces):
                for count, is_end in pieces:
                    num_tokens += count
                    num_ends += is_end
                    if plan.leaves_after is not None and not num_ends and num_tokens > plan.leaves_after:
                        how = "left"
                        break
        except (ServingError, OSError, http.client.HTTPException) as error:
            how, text = "failed", str(error)
            if isinstance(error, ConnectionRefusedError) or (isinstance(error, ServingError) and not error.was_taken):
                how = "refused"
            if "no word from the server" in text or isinstance(error, TimeoutError):
                how = "wrong"
        if not how:
            how = "answered" if num_ends == 1 else "wrong"
            text = "" if num_ends == 1 else f"{num_ends} ends"
        elif how != "left" and num_ends:
            how, text = "wrong", f"an error behind the end: {text}"
        ended = time.monotonic()
        return Ending(
            plan=plan, request_id=request_id, how=how, began=began, ended=ended, num_tokens=num_tokens, text=text
        )

    def _triton(self, plan: Plan, request_id: str) -> Generator[tuple[int, bool], None, None]:
        params = SamplingParams(max_tokens=plan.max_tokens, **plan.options)
        prompt = self._tokenizer.encode(plan.prompt) if plan.path == CORE else plan.prompt
        for chunk in self._client(plan.path).stream(prompt, params, timeout_s=ANSWER_S, request_id=request_id):
            yield len(chunk.token_ids), chunk.finish_reason is not None

    def _client(self, path: str) -> Client:
        if path not in self._clients:
            self._clients[path] = Client(self._service.grpc_url, model=path)
        return self._clients[path]

    def _openai(self, plan: Plan, request_id: str) -> Generator[tuple[int, bool], None, None]:
        body = {"model": "soaked", "prompt": plan.prompt, "max_tokens": plan.max_tokens, "stream": True, **plan.options}
        headers = {"Content-Type": "application/json", "X-Request-Id": request_id}
        connection = http.client.HTTPConnection(self._service.front.address.removeprefix("http://"), timeout=LOST_S)
        with closing(connection):
            connection.request("POST", "/v1/completions", json.dumps(body), headers)
            response = connection.getresponse()
            if response.status != 200:
                text = response.read().decode(errors="replace")
                raise ServingError(text, was_taken=response.status not in LATER)
            has_ended = False
            for line in response:
                if line.startswith(b"data: [DONE]"):
                    has_ended = True
                elif line.startswith(b"data: "):
                    event = json.loads(line[6:])
                    if "error" in event:
                        raise ServingError(event["error"]["message"])
                    (choice,) = event["choices"]
                    yield bool(choice["text"]), choice["finish_reason"] is not None
            if not has_ended:
                raise ServingError("the stream was cut off")
