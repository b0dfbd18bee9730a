"""Files in and out of `train_tiny_pt.py`: public-domain prose, the tokenizer made of it, the `pt` layout."""

from __future__ import annotations

import gzip
import hashlib
import json
import re
import shutil
import struct
import subprocess
import tempfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from tamm.models.afm_text.afm_pt_moe import AFMParallelTrackMoEConfig as Config
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch import Tensor

SPECIAL_TOKENS = ("<|pad|>", "<|bos|>", "<|eos|>")
PAD_ID, BOS_ID, EOS_ID = range(3)

LINEARS = {  # tamm's name -> ours; tamm stores [tracks, (experts,) in, out], the pt layout [out, in] for each
    "attention.output_transform": "self_attn.o_proj",
    "feed_forward.hidden_transform.linear_0": "mlp.gate_proj",
    "feed_forward.hidden_transform.linear_1": "mlp.up_proj",
    "feed_forward.output_transform": "mlp.down_proj",
    "feed_forward.router.input_transform": "mlp.router",
}
EXPERT_LINEARS = {
    "feed_forward.experts.hidden_transform.linear_0": "gate_proj",
    "feed_forward.experts.hidden_transform.linear_1": "up_proj",
    "feed_forward.experts.output_transform": "down_proj",
}
NORMS = {
    "attention.norm": "input_layernorm",
    "attention.qk_norm.query_norm": "self_attn.q_norm",
    "attention.qk_norm.key_norm": "self_attn.k_norm",
    "feed_forward.norm": "post_attention_layernorm",
}

# One chapter or dictionary entry: its paragraphs, each on one line.
Document = list[str]


class Source(NamedTuple):
    """A Debian package whose text may be used by anyone for anything."""

    package: str
    file: str  # below the package's root
    licence: str
    parse: Callable[[bytes], list[Document]]


def fetch_source(name: str, folder: Path) -> tuple[list[Document], dict[str, Any]]:
    """Downloads and unpacks the package of source `name` below `folder`; returns its documents and a record of it."""
    source = SOURCES[name]
    folder.chmod(0o755)  # apt's download user must be able to enter it
    if subprocess.run(["apt-get", "download", source.package], cwd=folder, capture_output=True).returncode:
        subprocess.run(["apt-get", "update"], check=True, capture_output=True)
        subprocess.run(["apt-get", "download", source.package], cwd=folder, check=True, capture_output=True)
    (package,) = folder.glob(f"{source.package}_*.deb")
    root = folder / source.package
    subprocess.run(["dpkg", "-x", package.name, root.name], cwd=folder, check=True)
    raw = (root / source.file).read_bytes()
    _, version, _ = package.stem.split("_")
    record = {
        "package": source.package,
        "version": version.replace("%3a", ":"),
        "package_sha256": hashlib.sha256(package.read_bytes()).hexdigest(),
        "file": source.file,
        "file_sha256": hashlib.sha256(raw).hexdigest(),
        "licence": source.licence,
    }
    return source.parse(raw), record


def read_text_file(path: Path) -> tuple[list[Document], dict[str, Any]]:
    """Reads a UTF-8 text file (or `.gz`) of the user; chapter headings separate documents."""
    raw = path.read_bytes()
    text = (gzip.decompress(raw) if path.suffix == ".gz" else raw).decode("utf-8")
    return split_chapters(text), {"file": path.name, "file_sha256": hashlib.sha256(raw).hexdigest()}


def split_chapters(text: str) -> list[Document]:
    """Cuts a book at its headings; page headers, title lines, `_emphasis_` marks and hard line breaks go."""
    text = text.split("A NOTE ON THE TEXT")[0].replace("\r", "").replace("_", "")
    documents: list[Document] = [[]]
    for block in re.split(r"\n\s*\n", text):
        paragraph = " ".join(block.split())
        if re.fullmatch(r"(chapter|volume|book|part|letter) ([ivxlc]+|\d+)\.?|the end|finis", paragraph, re.I):
            documents.append([])
            continue
        is_long = len(paragraph) > 30 and paragraph.upper() != paragraph  # else a title or a date,
        if is_long or (documents[-1] and re.search(r"[a-z].*[.!?\"]$", paragraph)):  # or a short spoken line
            documents[-1].append(paragraph)
    return [d for d in documents if sum(map(len, d)) > 200]


def split_validation(documents: list[Document], every: int = 20) -> tuple[list[Document], list[Document]]:
    """Holds out every 20th document, or the last twentieth of each one where there are few."""
    if len(documents) >= 2 * every:
        held = [d for i, d in enumerate(documents) if i % every == every // 2]
        return [d for i, d in enumerate(documents) if i % every != every // 2], held
    cuts = [len(d) - max(1, len(d) // every) for d in documents]
    return (
        [d[:c] for d, c in zip(documents, cuts, strict=True)],
        [d[c:] for d, c in zip(documents, cuts, strict=True)],
    )


def train_tokenizer(documents: list[Document], vocab_size: int) -> Tokenizer:
    """A byte-level BPE tokenizer that prepends `<|bos|>`; ids 0, 1 and 2 are pad, bos and eos."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(("\n\n".join(d) for d in documents), trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<|bos|> $A", pair="<|bos|> $A $B", special_tokens=[("<|bos|>", BOS_ID)]
    )
    return tokenizer


def encode(tokenizer: Tokenizer, documents: list[Document]) -> list[int]:
    """One stream of token ids, each document closed by `<|eos|>`."""
    encodings = tokenizer.encode_batch(["\n\n".join(d) for d in documents], add_special_tokens=False)
    return [token for e in encodings for token in (*e.ids, EOS_ID)]


def to_pt_layout(state: dict[str, Tensor], config: Config) -> dict[str, Tensor]:
    """tamm's state dict under the names and in the shapes of the pt layout."""
    tensors = {"model.embed_tokens.weight": state["embedding.weight"], "model.norm.weight": state["output_norm.weight"]}
    heads, kv_heads, dim = config.num_heads, config.num_kv_heads or config.num_heads, config.dim_per_head
    interval = config.num_layers_per_track_per_sync_point
    for i in range(config.num_layers_per_track):
        source = f"layers.segment_{i // interval}.layer_{i % interval}"
        for t in range(config.num_tracks):
            target = f"model.tracks.{t}.layers.{i}"
            qkv = state[f"{source}.attention.qkv_transform.fused_linear.weight"][t].T
            for name, w in zip("qkv", qkv.split((heads * dim, kv_heads * dim, kv_heads * dim)), strict=True):
                tensors[f"{target}.self_attn.{name}_proj.weight"] = w
            for theirs, ours in NORMS.items():
                tensors[f"{target}.{ours}.weight"] = state[f"{source}.{theirs}.weight"][t]
            for theirs, ours in LINEARS.items():
                if (key := f"{source}.{theirs}.weight") in state:
                    tensors[f"{target}.{ours}.weight"] = state[key][t].T
            for theirs, ours in EXPERT_LINEARS.items():
                for e, w in enumerate(state.get(f"{source}.{theirs}.weight", [[]] * config.num_tracks)[t]):
                    tensors[f"{target}.mlp.experts.{e}.{ours}.weight"] = w.T
    return tensors


def from_pt_layout(tensors: dict[str, Tensor], config: Config) -> dict[str, Tensor]:
    """The inverse of `to_pt_layout`, in float32, with tamm's second name of the tied embedding."""
    state = dict.fromkeys(("embedding.weight", "output_transform.weight"), tensors["model.embed_tokens.weight"])
    state["output_norm.weight"] = tensors["model.norm.weight"]
    interval = config.num_layers_per_track_per_sync_point

    def stack(i: int, name: str) -> Tensor:
        parts = [tensors[f"model.tracks.{t}.layers.{i}.{name}.weight"] for t in range(config.num_tracks)]
        return torch.stack([w.T if w.ndim == 2 else w for w in parts])

    for i in range(config.num_layers_per_track):
        layer = f"layers.segment_{i // interval}.layer_{i % interval}"
        qkv = torch.cat([stack(i, f"self_attn.{name}_proj") for name in "qkv"], -1)
        state[f"{layer}.attention.qkv_transform.fused_linear.weight"] = qkv
        for theirs, ours in NORMS.items() | LINEARS.items():
            if f"model.tracks.0.layers.{i}.{ours}.weight" in tensors:
                state[f"{layer}.{theirs}.weight"] = stack(i, ours)
        if f"model.tracks.0.layers.{i}.mlp.router.weight" in tensors:
            for theirs, ours in EXPERT_LINEARS.items():
                experts = [stack(i, f"mlp.experts.{e}.{ours}") for e in range(config.num_experts)]
                state[f"{layer}.{theirs}.weight"] = torch.stack(experts, 1)
    return {k: v.float() for k, v in state.items()}


def pt_config(config: Config, max_positions: int) -> dict[str, Any]:
    sparse = "sparse" in config.feed_forward_layer_pattern
    return {
        "model_type": "parallel_track",
        "architectures": ["PTForCausalLM"],
        "vocab_size": config.vocab_size,
        "num_tracks": config.num_tracks,
        "num_hidden_layers": config.num_layers_per_track,
        "sync_interval": config.num_layers_per_track_per_sync_point,
        "hidden_size": config.hidden_dim,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads or config.num_heads,
        "head_dim": config.dim_per_head,
        "intermediate_size": config.dense_feed_forward_hidden_dim,
        "moe_intermediate_size": config.sparse_feed_forward_hidden_dim if sparse else None,
        "num_experts": config.num_experts if sparse else 0,
        "num_experts_per_tok": config.num_experts_per_token if sparse else 0,
        "router_logits_cap": config.experts_router_logits_cap if sparse else None,
        "attention_pattern": list(config.attention_layer_pattern),
        "attention_window": config.local_attention_window_size,
        "feed_forward_pattern": list(config.feed_forward_layer_pattern),
        "rope_theta": config.rope_theta,
        "rope_style": "interleaved",
        "rope_scaling": None,
        "qk_norm": "scaled",
        "qk_norm_position": "after_rope",
        "pre_norm": "rms_norm",
        "post_norm": None,
        "pre_residual_norm": None,
        "dispatch_norm": None,
        "combine_norm": None,
        "combine_op": "mean",
        "rms_norm_eps": config.norm_eps,
        "tie_word_embeddings": True,
        "attention_bias": False,
        "attention_out_bias": False,
        "mlp_bias": False,
        "max_position_embeddings": max_positions,
        "bos_token_id": BOS_ID,
        "eos_token_id": EOS_ID,
        "pad_token_id": PAD_ID,
        "dtype": "bfloat16",
    }


def tokenizer_config(max_positions: int) -> dict[str, Any]:
    pad, bos, eos = SPECIAL_TOKENS
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "pad_token": pad,
        "bos_token": bos,
        "eos_token": eos,
        "model_max_length": max_positions,
        "clean_up_tokenization_spaces": False,
    }


def write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def publish(staging: Path, out: Path) -> None:
    """Puts the complete folder in place of `out`; an old one is moved aside first and removed last."""
    staging.chmod(0o755)  # mkdtemp makes it private, and safetensors its files
    for path in staging.iterdir():
        path.chmod(0o644)
    if out.exists():
        old = Path(tempfile.mkdtemp(prefix=f".{out.name}.old.", dir=out.parent))
        out.rename(old / out.name)
        staging.rename(out)
        shutil.rmtree(old)
    else:
        staging.rename(out)


def _parse_austen(raw: bytes) -> list[Document]:
    return [d for book in _r_character_vectors(raw) for d in split_chapters("\n".join(book))]


def _r_character_vectors(raw: bytes) -> Iterator[list[str]]:
    """Yields the character vectors of an R lazy-load database: big-endian size, zlib stream, and so on to the end."""
    while raw:
        stream = zlib.decompressobj()
        data = stream.decompress(raw[4:])
        raw = stream.unused_data
        (encoding_bytes,) = struct.unpack_from(">i", data, 14)  # R serialization, version 3, after "X\n" and versions
        position = 18 + encoding_bytes
        kind, count = struct.unpack_from(">ii", data, position)
        if kind & 0xFF != 16:
            raise ValueError(f"R object of type {kind & 0xFF} found, a character vector (16) expected")
        position += 8
        lines = []
        for _ in range(count):
            _, num_bytes = struct.unpack_from(">ii", data, position)  # -1 is R's NA
            position += 8 + max(num_bytes, 0)
            lines.append(data[position - max(num_bytes, 0) : position].decode("utf-8"))
        yield lines


def _parse_jargon(raw: bytes) -> list[Document]:
    text = gzip.decompress(raw).decode("utf-8")
    text = re.sub(r"[{}]", "", text[text.index("\n   :") :])  # braces mark cross-references
    text = re.sub(r"^\s*[═─━\-=_]{5,}\s*$", "", text, flags=re.M)
    entries = re.split(r"\n(?=   :)", text)
    return [[" ".join(block.split()) for block in re.split(r"\n\s*\n", e) if block.strip()] for e in entries if e]


SOURCES = {
    "austen": Source(
        "r-cran-janeaustenr",
        "usr/lib/R/site-library/janeaustenr/data/Rdata.rdb",
        "novels: public domain (published 1811-1818); packaging: MIT",
        _parse_austen,
    ),
    "jargon": Source(
        "jargon-text", "usr/share/doc/jargon-text/jargon.txt.gz", "Jargon File 4.4.7: public domain", _parse_jargon
    ),
}
