"""`tensorrt_llm.models`, `tensorrt_llm.builder` and `tensorrt_llm._utils`"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from safetensors.torch import load_file

from pt_trtllm.testing.trtllm_recorder.functional import PositionEmbeddingType
from pt_trtllm.testing.trtllm_recorder.layers import Mapping
from pt_trtllm.testing.trtllm_recorder.module import Module, ModuleList
from pt_trtllm.testing.trtllm_recorder.network import Network, Tensor, net_guard, record

MODEL_MAP: dict[str, Any] = {}
QUANTIZATION_KEYS = {"quant_algo", "kv_cache_quant_algo", "group_size", "has_zero_point"}


def pad_vocab_size(vocab_size: int, tp_size: int) -> int:
    return -(-vocab_size // tp_size) * tp_size


class PretrainedConfig:
    def __init__(
        self, *, architecture: str, dtype: str, logits_dtype: str, vocab_size: int, hidden_size: int,
        num_hidden_layers: int, num_attention_heads: int, num_key_value_heads: int, head_size: int,
        intermediate_size: int, hidden_act: str, norm_epsilon: float, position_embedding_type: str,
        max_position_embeddings: int, qk_layernorm: bool, use_parallel_embedding: bool, mapping: dict[str, int],
        quantization: dict[str, Any], runtime_defaults: dict[str, Any] | None = None, **others: Any,
    ) -> None:  # fmt: skip
        if logits_dtype not in ("float32", "float16"):
            raise ValueError(f"logits_dtype {logits_dtype}: the C++ runtime takes float32 or float16")
        if unknown := set(quantization) - QUANTIZATION_KEYS:
            raise TypeError(f"QuantConfig: unexpected {unknown}")
        given = dict(locals())
        for name in ("self", "others", "__class__", "unknown", "mapping", "position_embedding_type"):
            given.pop(name, None)
        for name, value in {**given, **others}.items():
            setattr(self, name, value)
        self.mapping = Mapping(**mapping)
        self.position_embedding_type = PositionEmbeddingType.from_string(position_embedding_type)
        self.quant_mode = 0

    @classmethod
    def from_checkpoint(cls, ckpt_dir: str) -> Any:
        config = json.loads((Path(ckpt_dir) / "config.json").read_text())
        model_class = MODEL_MAP[config["architecture"]]  # a model that is not registered raises here
        return getattr(model_class, "config_class", cls)(**config)

    def set_rank(self, rank: int) -> None:
        self.mapping.rank = rank

    def to_dict(self) -> dict[str, Any]:
        data = {**vars(self), "position_embedding_type": self.position_embedding_type.name}
        data["mapping"] = {"world_size": self.mapping.world_size, "tp_size": self.mapping.tp_size}
        return data


class DecoderLayerList(ModuleList):
    def __init__(self, cls: Any, config: Any) -> None:
        super().__init__([cls(config, idx) for idx in config.mapping.pp_layers(config.num_hidden_layers)])

    def forward(
        self, hidden_states: Any, use_cache: bool, attention_mask: None, kv_cache_params: Any,
        attention_params: Any, position_ids: Any,
    ) -> Any:  # fmt: skip
        presents = []
        for layer in self:
            extra = {} if position_ids is None else {"position_ids": position_ids}
            hidden_states = layer(
                hidden_states, use_cache=use_cache, attention_mask=attention_mask, kv_cache_params=kv_cache_params,
                attention_params=attention_params, **extra,
            )  # fmt: skip
            if use_cache:
                presents.append(hidden_states[1])
                hidden_states = hidden_states[0]
        return (hidden_states, presents) if use_cache else hidden_states


class DecoderModelForCausalLM(Module):
    def __init__(self, config: Any, transformer: Module, lm_head: Module) -> None:
        super().__init__()
        self.config, self.transformer, self.lm_head = config, transformer, lm_head

    @classmethod
    def from_checkpoint(
        cls, ckpt_dir: str, rank: int, config: Any, *, preprocess_weights_hook: Callable[[Any], Any]
    ) -> Any:
        config.set_rank(rank)
        weights = preprocess_weights_hook(load_file(Path(ckpt_dir) / f"rank{rank}.safetensors"))
        model = cls(config)  # type: ignore[call-arg]
        model.load(weights)
        return model

    def load(self, weights: dict[str, torch.Tensor]) -> None:
        """Stricter than the real one: a tensor that no parameter takes is an error, too."""
        parameters = dict(self.named_parameters())
        tied = {"lm_head.weight"} if "lm_head.weight" not in weights else set()
        if parameters.keys() - tied != weights.keys():
            missing, extra = parameters.keys() - tied - weights.keys(), weights.keys() - parameters.keys()
            raise RuntimeError(f"required but not provided: {sorted(missing)}; provided, not required: {sorted(extra)}")
        for name, value in weights.items():
            if not value.is_contiguous():
                raise ValueError(f"{name} is not contiguous")
            try:
                parameters[name].value = value
            except ValueError as error:
                raise RuntimeError(f"{name}: {error}") from None
        if tied:  # what the builder's pass `share_embedding` does
            parameters["lm_head.weight"].value = weights["transformer.vocab_embedding.weight"]

    def forward(
        self, input_ids: Tensor, position_ids: Tensor, use_cache: bool, last_token_ids: None, kv_cache_params: Any,
        attention_params: Any,
    ) -> None:  # fmt: skip
        hidden = self.transformer.forward(  # type: ignore[attr-defined]
            input_ids=input_ids, position_ids=position_ids, use_cache=use_cache, attention_mask=None,
            kv_cache_params=kv_cache_params, attention_params=attention_params,
        )  # fmt: skip
        if use_cache:
            hidden, _ = hidden
        self.lm_head(hidden).mark_output("logits", self.config.logits_dtype)


class BuildConfig:
    def __init__(
        self,
        *,
        max_batch_size: int,
        max_input_len: int,
        max_seq_len: int,
        max_num_tokens: int,
        gather_context_logits: bool,
    ) -> None:
        self.max_batch_size, self.max_input_len = max_batch_size, max_input_len
        self.max_seq_len, self.max_num_tokens = max_seq_len, max_num_tokens
        self.gather_context_logits = gather_context_logits
        self.plugin_config = SimpleNamespace(gemm_plugin=None, gemm_allreduce_plugin="float16")


class Engine:
    """The recorded network in an engine's place."""

    def __init__(self, network: Network, config: Any, build_config: BuildConfig) -> None:
        self.network, self._config, self._build_config = network, config, build_config

    def save(self, engine_dir: str) -> None:
        """As the real one: config.json only from rank 0."""
        rank = self._config.mapping.rank
        (Path(engine_dir) / f"rank{rank}.engine").write_text("\n".join(node.op for node in self.network.nodes))
        if rank == 0:
            build_config = {**vars(self._build_config), "plugin_config": vars(self._build_config.plugin_config)}
            config = {"version": "1.2.1", "pretrained_config": self._config.to_dict(), "build_config": build_config}
            (Path(engine_dir) / "config.json").write_text(json.dumps(config))


def build(model: Any, build_config: BuildConfig) -> Engine:
    """Defines the network as the real builder does: padding removed, paged cache, logits of all tokens."""
    network = Network()
    network.plugin_config.gemm_allreduce_plugin = build_config.plugin_config.gemm_allreduce_plugin
    model.name_scopes()
    with net_guard(network):
        inputs = [record("input", (), "int32", 1, name=name) for name in ("input_ids", "position_ids")]
        model(*inputs, use_cache=True, last_token_ids=None, kv_cache_params=object(), attention_params=object())
    return Engine(network, model.config, build_config)


class ModelRunnerCpp:
    """Only what a call looks like: it stands for a runtime of GPUs."""

    @classmethod
    def from_dir(cls, engine_dir: str, rank: int) -> ModelRunnerCpp:
        json.loads((Path(engine_dir) / "config.json").read_text())
        return cls()

    def generate(
        self, batch_input_ids: list[torch.Tensor], max_new_tokens: int, end_id: int, pad_id: int, return_dict: bool,
        output_sequence_lengths: bool,
    ) -> dict[str, torch.Tensor]:  # fmt: skip
        """Echoes: each prompt and its first token again and again."""
        assert return_dict
        assert output_sequence_lengths
        rows = [torch.cat([prompt, prompt[:1].repeat(max_new_tokens)]) for prompt in batch_input_ids]
        longest = max(len(row) for row in rows)
        padded = [torch.cat([row, row.new_full((longest - len(row),), pad_id)]) for row in rows]
        lengths = torch.tensor([[len(row)] for row in rows])
        return {"output_ids": torch.stack(padded)[:, None], "sequence_lengths": lengths}
