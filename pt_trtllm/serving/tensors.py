"""The tensors of every model: names, types and shapes that users of TensorRT-LLM's Triton backend know.

Shapes leave out the batch dimension. `*_PRIVATE` tensors are our own; they come last, and no client needs them.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Tensor:
    name: str
    dtype: str
    """Triton's name without TYPE_."""
    dims: tuple[int, ...] = (1,)
    required: bool = False
    scalar: bool = False
    """The model sees it without a dimension of its own, as TensorRT-LLM's backend wants it."""
    ragged: bool = False


def _row(dtype: str, names: str, dims: tuple[int, ...] = (1,), *, scalar: bool = False) -> tuple[Tensor, ...]:
    return tuple(Tensor(name, dtype, dims, scalar=scalar) for name in names.split())


RETURN_FLAGS = "return_log_probs return_context_logits return_generation_logits return_perf_metrics"
COUNT_FLAGS = "return_num_input_tokens return_num_output_tokens"
GUIDED = "guided_decoding_guide_type guided_decoding_guide"

ENSEMBLE_INPUTS = (
    Tensor("text_input", "STRING", required=True),
    Tensor("max_tokens", "INT32", required=True),
    *_row("BOOL", f"stream exclude_input_in_output {RETURN_FLAGS} {COUNT_FLAGS}"),
    *_row("STRING", "stop_words bad_words", (-1,)),
    *_row("INT32", "end_id pad_id top_k beam_width min_tokens num_return_sequences min_length"),
    *_row("FP32", "top_p temperature length_penalty repetition_penalty presence_penalty frequency_penalty"),
    *_row("UINT64", "seed random_seed"),
    *_row("STRING", GUIDED),
    Tensor("embedding_bias_words", "STRING", (-1,)),
    Tensor("embedding_bias_weights", "FP32", (-1,)),
    *_row("UINT64", "lora_task_id prompt_table_extra_id"),
    Tensor("lora_weights", "FP16", (-1, -1)),
    Tensor("lora_config", "INT32", (-1, 3)),
    Tensor("prompt_embedding_table", "FP16", (-1, -1)),
    *_row("INT32", "prompt_vocab_size"),
    *_row("STRING", "decoder_text_input"),
    *_row("INT32", "num_logprobs"),
    *_row("FP32", "min_p timeout_s priority"),
    *_row("BOOL", "ignore_eos include_stop_str_in_output"),
    *_row("INT32", "stop_token_ids", (-1,)),
    *_row("STRING", "logit_bias bad_words_ids"),
)
"""The last five rows are our own; `logit_bias` and `bad_words_ids` are JSON.
`min_length` and `random_seed` are former names that older clients send."""

BLS_EXTRA_INPUTS = (*_row("INT32", "num_draft_tokens"), *_row("BOOL", "use_draft_logits"))

SCALAR_OUTPUTS = (
    *_row("INT32", "batch_index sequence_index num_input_tokens num_output_tokens"),
    *_row("INT32", "kv_cache_alloc_new_blocks kv_cache_reused_blocks kv_cache_alloc_total_blocks"),
    *_row("INT64", "arrival_time_ns first_scheduled_time_ns first_token_time_ns last_token_time_ns"),
    *_row("FP32", "acceptance_rate"),
    *_row("INT32", "total_accepted_draft_tokens total_draft_tokens"),
)
LOG_PROB_OUTPUTS = (Tensor("cum_log_probs", "FP32", (-1,)), Tensor("output_log_probs", "FP32", (-1, -1)))
LOGIT_OUTPUTS = (Tensor("context_logits", "FP32", (-1, -1)), Tensor("generation_logits", "FP32", (-1, -1, -1)))
END_OUTPUTS = _row("STRING", "finish_reason error_message logprobs")
"""finish_reason and error_message come with the last piece: why it ended. logprobs is JSON, one row per token."""
ENSEMBLE_OUTPUTS = (
    Tensor("text_output", "STRING", (-1,)), *LOG_PROB_OUTPUTS, *LOGIT_OUTPUTS, *SCALAR_OUTPUTS, *END_OUTPUTS,
    Tensor("output_ids", "INT32", (-1, -1)),
)  # fmt: skip

CORE_INPUTS = (
    Tensor("input_ids", "INT32", (-1,), required=True, ragged=True),
    Tensor("input_lengths", "INT32", required=True, scalar=True),
    Tensor("request_output_len", "INT32", required=True, scalar=True),
    *_row("BOOL", f"streaming stop early_stopping exclude_input_in_output {RETURN_FLAGS} {COUNT_FLAGS}", scalar=True),
    *_row("INT32", "end_id pad_id beam_width min_tokens num_return_sequences", scalar=True),
    *_row("INT32", "runtime_top_k runtime_top_p_reset_ids", scalar=True),
    *_row("FP32", "runtime_top_p runtime_top_p_min runtime_top_p_decay temperature len_penalty", scalar=True),
    *_row("FP32", "repetition_penalty presence_penalty frequency_penalty", scalar=True),
    *_row("FP32", "beam_search_diversity_rate draft_acceptance_threshold", scalar=True),
    *_row("UINT64", "seed lora_task_id", scalar=True),
    *_row("INT32", "stop_words_list bad_words_list", (2, -1)),
    Tensor("embedding_bias", "FP32", (-1,)),
    *_row("INT32", "draft_input_ids decoder_input_ids", (-1,)),
    *_row("INT32", "decoder_input_lengths", scalar=True),
    Tensor("draft_logits", "FP32", (-1, -1)),
    Tensor("lora_weights", "FP16", (-1, -1)),
    Tensor("lora_config", "INT32", (-1, 3)),
    Tensor("prompt_embedding_table", "FP16", (-1, -1)),
    *_row("INT32", "prompt_vocab_size", scalar=True),
    Tensor("prompt_table_extra_ids", "UINT64", (-1,)),
    *_row("STRING", GUIDED),
    *_row("INT32", "lookahead_window_size lookahead_ngram_size lookahead_verification_set_size", scalar=True),
    *_row("INT32", "retention_token_range_starts retention_token_range_ends", (-1,)),
    *_row("INT32", "retention_token_range_priorities retention_token_range_durations_ms", (-1,)),
    *_row("INT32", "retention_decode_priority retention_decode_duration_ms", scalar=True),
    Tensor("context_phase_params", "UINT8", (-1,)),
)
CORE_PRIVATE_INPUTS = (
    *_row("STRING", "stop_words bad_words", (-1,)),
    *_row("INT32", "num_logprobs"),
    *_row("FP32", "min_p timeout_s priority"),
    *_row("BOOL", "ignore_eos include_stop_str_in_output"),
    *_row("INT32", "stop_token_ids", (-1,)),
    *_row("STRING", "logit_bias bad_words_ids"),
    *_row("INT32", "min_length"),
    *_row("UINT64", "random_seed"),
    *_row("STRING", "prompt_text"),
)
"""Stop strings go to the core as text too: tokens alone miss those that straddle a token's border."""

CORE_OUTPUTS = (
    Tensor("output_ids", "INT32", (-1, -1)),
    Tensor("sequence_length", "INT32", (-1,)),
    *LOG_PROB_OUTPUTS,
    *LOGIT_OUTPUTS,
    *SCALAR_OUTPUTS,
)
MANY_PER_PROMPT = frozenset(
    {tensor.name for tensor in (*SCALAR_OUTPUTS, *END_OUTPUTS)} - {"batch_index", "sequence_index"}
)
"""Outputs that have a value per sample, where one response carries all samples."""
CORE_PRIVATE_OUTPUTS = (*END_OUTPUTS, Tensor("text_piece", "STRING", (-1,)), Tensor("stream_id", "STRING"))

MAX_LENGTH = "max_seq_len"
"""Parameter of the core, for whoever reads its configuration: tokens of prompt and answer together."""

PREPROCESSING_INPUTS = (
    Tensor("QUERY", "STRING", required=True),
    *_row("STRING", "DECODER_QUERY"),
    Tensor("REQUEST_OUTPUT_LEN", "INT32", required=True),
    *_row("STRING", "BAD_WORDS_DICT STOP_WORDS_DICT EMBEDDING_BIAS_WORDS", (-1,)),
    Tensor("EMBEDDING_BIAS_WEIGHTS", "FP32", (-1,)),
    *_row("INT32", "END_ID PAD_ID"),
    *_row("UINT64", "PROMPT_TABLE_EXTRA_ID"),
)
PREPROCESSING_OUTPUTS = (
    Tensor("INPUT_ID", "INT32", (-1,)),
    *_row("INT32", "REQUEST_INPUT_LEN"),
    Tensor("DECODER_INPUT_ID", "INT32", (-1,)),
    *_row("INT32", "REQUEST_DECODER_INPUT_LEN REQUEST_OUTPUT_LEN"),
    *_row("INT32", "BAD_WORDS_IDS STOP_WORDS_IDS", (2, -1)),
    Tensor("EMBEDDING_BIAS", "FP32", (-1,)),
    *_row("INT32", "OUT_END_ID OUT_PAD_ID"),
    Tensor("OUT_PROMPT_TABLE_EXTRA_IDS", "UINT64", (-1,)),
)
POSTPROCESSING_INPUTS = (
    Tensor("TOKENS_BATCH", "INT32", (-1, -1), required=True),
    Tensor("SEQUENCE_LENGTH", "INT32", (-1,), required=True),
)
"""Optional where the core sends text: then the ensemble passes the two below instead."""
POSTPROCESSING_PRIVATE_INPUTS = (Tensor("TEXT_PIECE", "STRING", (-1,)), *_row("STRING", "STREAM_ID"))
POSTPROCESSING_OUTPUTS = (Tensor("OUTPUT", "STRING", (-1,)),)

VLLM_INPUTS = (
    Tensor("text_input", "STRING", required=True),
    *_row("BOOL", "stream exclude_input_in_output"),
    *_row("STRING", "sampling_parameters"),
    *_row("BOOL", f"return_finish_reason return_cumulative_logprob return_logprobs {COUNT_FLAGS}"),
)
"""Of Triton's vLLM backend, whose models have no batch dimension. `sampling_parameters` is JSON of vLLM's own names."""
VLLM_OUTPUTS = (
    *_row("STRING", "text_output finish_reason", (-1,)),
    Tensor("cumulative_logprob", "FP32", (-1,)),
    Tensor("logprobs", "STRING", (-1,)),
    Tensor("num_input_tokens", "UINT32"),
    Tensor("num_output_tokens", "UINT32", (-1,)),
)

PREPROCESSING_STEP = {
    "QUERY": "text_input",
    "DECODER_QUERY": "decoder_text_input",
    "REQUEST_OUTPUT_LEN": "max_tokens",
    "BAD_WORDS_DICT": "bad_words",
    "STOP_WORDS_DICT": "stop_words",
    "EMBEDDING_BIAS_WORDS": "embedding_bias_words",
    "EMBEDDING_BIAS_WEIGHTS": "embedding_bias_weights",
    "END_ID": "end_id",
    "PAD_ID": "pad_id",
    "PROMPT_TABLE_EXTRA_ID": "prompt_table_extra_id",
}
"""Input of the step: where the ensemble takes it from."""
PREPROCESSED = {
    "input_ids": "INPUT_ID",
    "input_lengths": "REQUEST_INPUT_LEN",
    "decoder_input_ids": "DECODER_INPUT_ID",
    "decoder_input_lengths": "REQUEST_DECODER_INPUT_LEN",
    "request_output_len": "REQUEST_OUTPUT_LEN",
    "bad_words_list": "BAD_WORDS_IDS",
    "stop_words_list": "STOP_WORDS_IDS",
    "embedding_bias": "EMBEDDING_BIAS",
    "end_id": "OUT_END_ID",
    "pad_id": "OUT_PAD_ID",
    "prompt_table_extra_ids": "OUT_PROMPT_TABLE_EXTRA_IDS",
}
"""Input of the core: output of preprocessing."""
RENAMED = {
    "streaming": "stream",
    "runtime_top_k": "top_k",
    "runtime_top_p": "top_p",
    "len_penalty": "length_penalty",
    "prompt_text": "text_input",
}
"""Input of the core: another name in the ensemble. All others have the same name in both."""
