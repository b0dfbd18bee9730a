"""The served model: what its tokenizer folder says about it, and questions as work for Triton."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from pt_trtllm.openai.answers import Ask
from pt_trtllm.openai.chat_template import load_chat_template, read_json, special_tokens
from pt_trtllm.openai.errors import NOT_FOUND, ApiError
from pt_trtllm.openai.options import FrontEndOptions
from pt_trtllm.openai.prompts import Prompts, check_context
from pt_trtllm.openai.requests import Chat, Completion, Question
from pt_trtllm.openai.tensors import bias_values, sampling_values, seed_of
from pt_trtllm.openai.token_text import TokenText
from pt_trtllm.openai.triton import TritonModel
from pt_trtllm.runtime.params import SEED_STEP, SamplingParams
from pt_trtllm.runtime.tokenizer import Tokenizer

NO_LIMIT = 1 << 24
"""Tokenizers without a known limit write 1e30 as their `model_max_length`."""


MAX_LOGPROB_ENTRIES = 1 << 22
"""Of all answers to a request that does not stream."""


class ServedModel:
    def __init__(self, options: FrontEndOptions) -> None:
        """Raises when the tokenizer or its chat template cannot be used."""
        folder = options.tokenizer_dir
        self.name = options.public_name
        self.tokenizer = Tokenizer(folder)
        self.texts = TokenText(self.tokenizer)
        self.template = load_chat_template(folder, options.chat_template)
        self.prompts = Prompts(self.tokenizer, self.template)
        config = read_json(folder / "tokenizer_config.json")
        limit = config.get("model_max_length")
        self._folders_limit = int(limit) if isinstance(limit, (int, float)) and 0 < limit < NO_LIMIT else None
        self.vocab_size = int(read_json(folder / "config.json").get("vocab_size") or self.tokenizer.vocab_size)
        """The model's own, which may be padded, where its folder says it."""
        self.end_ids = _end_ids(self.tokenizer, special_tokens(config), read_json(folder / "generation_config.json"))

    def context(self, engines_limit: int | None) -> int | None:
        """Tokens of prompt and answer together, as far as the engine and the tokenizer's folder know."""
        return min(filter(None, (engines_limit, self._folders_limit)), default=None)

    def check_name(self, name: str | None) -> None:
        if name is not None and name != self.name:
            raise ApiError(
                f"The model {name!r} does not exist; this server has {self.name!r}",
                status=NOT_FOUND, param="model", code="model_not_found",
            )  # fmt: skip

    async def asks(
        self, question: Completion | Chat, prompts: Sequence[tuple[int, ...]], triton: TritonModel, request_id: str
    ) -> list[Ask]:
        """One for each answer, in the order of the reply's choices."""
        context = self.context(await triton.max_length())
        params, extra = question.params, self.template.stop if isinstance(question, Chat) else ()
        params = dataclasses.replace(params, stop=tuple(dict.fromkeys((*params.stop, *extra))))
        declared = await triton.inputs()
        shared = sampling_values(params) | _question_values(question, declared)
        end_ids = frozenset() if params.ignore_eos else self.end_ids | set(params.stop_token_ids)
        if params.stop and "stop_words" in declared:
            shared["stop_words"] = params.stop
        if params.logit_bias:
            shared["embedding_bias"] = bias_values(params.logit_bias, self.vocab_size)
        asks: list[Ask] = []
        num_tokens = 0
        for ids in prompts:
            output_len = _output_len(question, len(ids), context)
            if context is not None or question.max_tokens is not None:
                num_tokens += output_len * question.n
                check_logprobs(question, num_tokens)
            for own in _samples(params, question.n):
                values = {
                    "input_ids": ids,
                    "input_lengths": len(ids),
                    "request_output_len": output_len,
                    "streaming": True,
                    "exclude_input_in_output": True,
                    **shared,
                    "seed": seed_of(own),
                }
                asks.append(
                    Ask(
                        request_id=f"{request_id}-{len(asks)}",
                        prompt_ids=ids,
                        params=own,
                        end_ids=end_ids,
                        values=values,
                        logprobs=question.logprobs,
                    )
                )
        return asks


def _output_len(question: Question, num_prompt: int, context: int | None) -> int:
    """Up to the end of the context where nothing else was asked. At least one: that is what engines compute."""
    wanted = 1 if question.max_tokens is None else max(1, question.max_tokens)
    check_context(num_prompt, wanted, context, "messages" if isinstance(question, Chat) else "prompt")
    return (context or NO_LIMIT) - num_prompt if question.max_tokens is None else wanted


def check_logprobs(question: Completion | Chat, num_tokens: int) -> None:
    """A whole answer is put together in memory, where each of its log-probabilities takes some hundred bytes."""
    entries = num_tokens * ((question.logprobs or 0) + 1)
    if question.logprobs is not None and not question.stream and entries > MAX_LOGPROB_ENTRIES:
        raise ApiError(
            f"up to {num_tokens} tokens with {question.logprobs} log-probabilities each are more than "
            f"{MAX_LOGPROB_ENTRIES}; ask for fewer, or stream the answers",
            param="logprobs",
        )


def _samples(params: SamplingParams, count: int) -> list[SamplingParams]:
    """With seeds of their own, as `run` derives them."""
    if params.seed is None:
        return [params] * count
    return [dataclasses.replace(params, seed=(params.seed + index * SEED_STEP) % (1 << 64)) for index in range(count)]


def _question_values(question: Completion | Chat, declared: Mapping[str, str]) -> dict[str, Any]:
    """Some servers can tell the most likely tokens and match stop strings; of others the front end asks the logits,
    and finds the strings itself."""
    values: dict[str, Any] = {}
    if question.guide is not None:
        values["guided_decoding_guide_type"], values["guided_decoding_guide"] = question.guide
    if question.logprobs is not None:
        values["return_log_probs"] = True
        if "num_logprobs" in declared:
            values["num_logprobs"] = question.logprobs
        elif question.logprobs:
            values["return_generation_logits"] = True
        if isinstance(question, Completion) and question.echo:
            values["return_context_logits"] = True
    return values


def _end_ids(tokenizer: Tokenizer, tokens: dict[str, str], generation: dict[str, Any]) -> frozenset[int]:
    """Tokens with which the model ends an answer."""
    named = tokenizer.token_id(tokens["eos_token"]) if tokens["eos_token"] else None
    listed = generation.get("eos_token_id", [])
    found = [named, *(listed if isinstance(listed, list) else [listed])]
    return frozenset(token for token in found if isinstance(token, int))
