#!/usr/bin/env python3
"""Trains a tiny Parallel Track language model on public-domain text, tokenizer included; writes it in the `pt` layout.

    python scripts/train_tiny_pt.py --out /tmp/my-pt                    # as shipped in examples/tiny-pt
    python scripts/train_tiny_pt.py --out /tmp/my-moe --moe --minutes 5 # with mixture-of-experts layers
    python scripts/train_tiny_pt.py --out /tmp/mine --text book.txt     # on your own text

The model is tamm's reference implementation. Training runs the same mathematics, on the same parameters, through a
leaner forward pass (`fast_logits`), which is checked against tamm before the first and after the last step.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import math
import platform
import shlex
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import tiny_pt_files as files
import tokenizers
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from tamm.models.afm_text.afm_pt_moe import AFMParallelTrackMoEConfig as Config
from torch import Tensor

PROMPTS = ("It is a truth", "She had never been", '"My dear Emma,')
REFERENCE_TOKENS = 24
OPTIMIZER = "AdamW, betas 0.9 and 0.98, gradient norm at most 1, warm-up over 4% of the run, cosine decay to 1%"
ROUTER_BALANCE_WEIGHT = 0.01


def main() -> None:
    args = parse_args()
    out: Path = args.out
    out.parent.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    with tempfile.TemporaryDirectory() as folder:
        if args.text:
            loaded = [files.read_text_file(path) for path in args.text]
        else:
            loaded = [files.fetch_source(name, Path(folder)) for name in args.source]
    documents = [d for docs, _ in loaded for d in docs]
    train_docs, held_docs = files.split_validation(documents)
    tokenizer = files.train_tokenizer(train_docs, args.vocab_size)
    train_ids = torch.tensor(files.encode(tokenizer, train_docs))
    held_ids = torch.tensor(files.encode(tokenizer, held_docs))
    config = make_config(args, tokenizer.get_vocab_size())
    model = config.create_model()
    initialise(model)
    num_parameters = sum(p.numel() for p in model.parameters())
    print(f"{len(documents)} documents, {len(train_ids)} training and {len(held_ids)} validation tokens", flush=True)
    print(f"{num_parameters / 1e6:.2f} M parameters, {config.num_tracks} tracks", flush=True)
    check_fast_logits(config)

    curve, wall_s = train(model, config, train_ids, held_ids, args)
    # What ships is bfloat16: everything reported below is of the weights as read back from the written file.
    staging = Path(tempfile.mkdtemp(prefix=f".{out.name}.", dir=out.parent))
    try:
        tensors = {
            k: v.to(torch.bfloat16).contiguous() for k, v in files.to_pt_layout(model.state_dict(), config).items()
        }
        save_file(tensors, staging / "model.safetensors", metadata={"format": "pt"})
        model.load_state_dict(files.from_pt_layout(load_file(staging / "model.safetensors"), config))
        held_loss = evaluate(model, config, held_ids, args.seq_len, reference=True)
        fast_loss = evaluate(model, config, held_ids, args.seq_len)
        if abs(held_loss - fast_loss) > 1e-4:
            raise RuntimeError(f"validation loss {fast_loss} by fast_logits, {held_loss} by tamm")
        held_bytes = sum(len("\n\n".join(d).encode()) for d in held_docs)
        record = {
            "command": shlex.join(["python", "scripts/train_tiny_pt.py", *sys.argv[1:]]),
            "data": {
                "sources": [record for _, record in loaded],
                "train_tokens": len(train_ids),
                "validation_tokens": len(held_ids),
                "validation_split": "every 20th document, or the last twentieth of each if there are fewer than 40",
            },
            "hyper_parameters": {k: v for k, v in vars(args).items() if k not in ("out", "force", "text")},
            "optimizer": OPTIMIZER,
            "parameters": num_parameters,
            "steps": curve[-1]["step"],
            "tokens_seen": curve[-1]["step"] * args.batch_size * args.seq_len,
            "wall_time_s": round(wall_s),
            "validation_of_shipped_weights": {
                "computed_by": "tamm, float32 arithmetic on the bfloat16 weights",
                "loss": round(held_loss, 4),
                "perplexity_per_token": round(math.exp(held_loss), 2),
                "bits_per_byte": round(held_loss / math.log(2) * len(held_ids) / held_bytes, 4),
                "loss_at_twice_the_training_length": round(
                    evaluate(model, config, held_ids, 2 * args.seq_len, reference=True), 4
                ),
            },
            "loss_curve": curve,
            "samples": sample_texts(model, config, tokenizer, args.seed),
            "hardware": {"cpu": cpu_model(), "threads": args.threads},
            "versions": {"python": platform.python_version(), "torch": torch.__version__, "tamm": tamm_version()}
            | {"tokenizers": tokenizers.__version__},
        }
        files.write_json(staging / "config.json", files.pt_config(config, 2 * args.seq_len))
        files.write_json(staging / "training.json", record)
        files.write_json(staging / "reference.json", greedy_reference(model, tokenizer))
        tokenizer.save(str(staging / "tokenizer.json"))
        files.write_json(staging / "tokenizer_config.json", files.tokenizer_config(2 * args.seq_len))
        files.publish(staging, out)
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    print(f"validation loss {held_loss:.4f}, perplexity {math.exp(held_loss):.2f}")
    for sample in record["samples"]:
        print(f"--- {sample['prompt']!r}\n{sample['text']}")
    print(f"wrote {out}")


def parse_args() -> argparse.Namespace:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--out", type=Path, required=True, help="folder to write")
    p.add_argument("--force", action="store_true", help="replace an existing --out once the new model is complete")
    p.add_argument(
        "--source", nargs="+", choices=sorted(files.SOURCES), default=["austen"], help="Debian text packages"
    )
    p.add_argument("--text", nargs="+", type=Path, help="UTF-8 text files to train on instead of --source")
    p.add_argument("--steps", type=int, default=3200, help="optimizer steps")
    p.add_argument("--minutes", type=float, help="train for this long instead of --steps")
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--threads", type=int, default=2)
    p.add_argument("--batch-size", type=int, default=4, help="sequences per step")
    p.add_argument("--seq-len", type=int, default=256)
    p.add_argument("--learning-rate", type=float, default=4e-3)
    p.add_argument("--weight-decay", type=float, default=0.1)
    p.add_argument("--vocab-size", type=int, default=2048)
    p.add_argument("--tracks", type=int, default=4)
    p.add_argument("--layers", type=int, default=4, help="layers per track")
    p.add_argument("--sync-interval", type=int, default=2, help="layers between two fusions of the tracks")
    p.add_argument("--hidden", type=int, default=128)
    p.add_argument("--intermediate", type=int, default=256, help="hidden size of a track's feed-forward layers")
    p.add_argument("--heads", type=int, default=2, help="query heads per track; there is one key-value head")
    p.add_argument("--head-dim", type=int, default=32)
    p.add_argument("--window", type=int, default=64, help="sliding window, without the current token")
    p.add_argument("--moe", action="store_true", help="every second feed-forward layer sparse: 4 experts, 2 active")
    args = p.parse_args()
    if args.out.exists() and not args.force:
        p.error(f"{args.out} exists; choose another --out or replace it with --force")
    if missing := [str(path) for path in args.text or () if not path.is_file()]:
        p.error(f"--text: no such file: {', '.join(missing)}")
    if args.layers % args.sync_interval:
        p.error(f"--layers {args.layers} is not a multiple of --sync-interval {args.sync_interval}")
    if args.steps < 1 or (args.minutes is not None and args.minutes <= 0):
        p.error("--steps and --minutes must be positive")
    return args


def make_config(args: argparse.Namespace, vocab_size: int) -> Config:
    return Config(
        vocab_size=vocab_size,
        num_tracks=args.tracks,
        num_layers_per_track=args.layers,
        num_layers_per_track_per_sync_point=args.sync_interval,
        hidden_dim=args.hidden,
        attention_hidden_dim=args.heads * args.head_dim,
        num_heads=args.heads,
        num_kv_heads=1,
        rope_theta=10000.0,
        local_attention_window_size=args.window,
        dense_feed_forward_hidden_dim=args.intermediate,
        sparse_feed_forward_hidden_dim=args.intermediate // 2,
        feed_forward_layer_pattern=("dense", "sparse") if args.moe else ("dense",),
        num_experts=4,
        num_experts_per_token=2,
    )


def initialise(model: torch.nn.Module) -> None:
    """Normal weights of unit gain, residual branches scaled down by their number, small embeddings, norms at one."""
    branches = sum(name.endswith("attention.output_transform.weight") for name, _ in model.named_parameters()) * 2
    for name, p in model.named_parameters():
        if name == "embedding.weight":
            torch.nn.init.normal_(p, std=0.08)
        elif "norm" in name:
            torch.nn.init.ones_(p)
        else:
            gain = 0.4 * branches**-0.5 if "layer_" in name and ".output_transform." in name else 1.0
            torch.nn.init.normal_(p, std=gain * p.shape[-2] ** -0.5)


class RmsNormalize(torch.autograd.Function):
    """x / rms(x) over the last dimension, without weight; fewer passes over memory than autograd's own."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, eps: float) -> Tensor:
        inverse = (x.square().mean(-1, keepdim=True) + eps).rsqrt()
        y = x * inverse
        ctx.save_for_backward(y, inverse)
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        y, inverse = ctx.saved_tensors
        (grad,) = grads
        return torch.addcmul(grad, y, (grad * y).mean(-1, keepdim=True), value=-1).mul_(inverse), None


def rms_normalize(x: Tensor, eps: float) -> Tensor:
    normalized: Tensor = RmsNormalize.apply(x, eps)  # type: ignore[no-untyped-call]
    return normalized


def fast_logits(p: Mapping[str, Tensor], config: Config, ids: Tensor) -> tuple[Tensor, Tensor]:
    """tamm's forward pass on its parameters `p`: `ids` [batch, seq] -> logits [batch * seq, vocab], router balance.

    Norm weights are multiplied into the matrices that follow; tracks share one product where their input is the same.
    """
    eps, heads, dim = config.norm_eps, config.num_heads, config.dim_per_head
    kv_heads = config.num_kv_heads or heads
    batch, seq = ids.shape
    tracks, interval = config.num_tracks, config.num_layers_per_track_per_sync_point
    distance = torch.arange(seq)[:, None] - torch.arange(seq)
    hidden = (distance < 0) | (distance > config.local_attention_window_size)
    window = torch.zeros(seq, seq).masked_fill(hidden, -math.inf)
    angles = torch.arange(seq)[:, None] * config.rope_theta ** (-torch.arange(0, dim, 2) / dim)
    cos, sin = angles.cos(), angles.sin()
    balance = torch.zeros(())

    def project(x: Tensor, norm: str, *names: str) -> Tensor:
        """RMS norm and linear: x [tracks or 1, tokens, hidden] -> [tracks, tokens, out]."""
        weight = torch.cat([p[f"{n}.weight"] for n in names], -1) * p[f"{norm}.weight"][:, :, None]
        x = rms_normalize(x, eps)
        if x.shape[0] == 1:
            return (x[0] @ weight.transpose(0, 1).flatten(1)).view(-1, tracks, weight.shape[-1]).transpose(0, 1)
        return torch.bmm(x, weight)

    def rotate(x: Tensor) -> Tensor:
        even, odd = x.unflatten(-1, (-1, 2)).unbind(-1)
        return torch.stack((even * cos - odd * sin, even * sin + odd * cos), -1).flatten(-2)

    h = F.embedding(ids.flatten(), p["embedding.weight"])[None]
    for i in range(config.num_layers_per_track):
        layer = f"layers.segment_{i // interval}.layer_{i % interval}"
        if i and i % interval == 0:
            h = h.mean(0, keepdim=True)
        local = config.attention_layer_pattern[i % len(config.attention_layer_pattern)] != "global_nope"
        a = f"{layer}.attention"
        qkv = project(h, f"{a}.norm", f"{a}.qkv_transform.fused_linear").reshape(tracks, batch, seq, -1, dim)
        q, k, v = qkv.transpose(2, 3).split((heads, kv_heads, kv_heads), 2)
        if local:
            q, k = rotate(q), rotate(k)
        q = rms_normalize(q, eps) * p[f"{a}.qk_norm.query_norm.weight"][:, None, None, None]
        k = rms_normalize(k, eps) * p[f"{a}.qk_norm.key_norm.weight"][:, None, None, None]
        k, v = (t.flatten(0, 1).repeat_interleave(heads // kv_heads, 1) for t in (k, v))
        mask = {"attn_mask": window} if local else {"is_causal": True}
        o = F.scaled_dot_product_attention(q.flatten(0, 1), k, v, **mask)
        o = o.transpose(1, 2).reshape(tracks, batch * seq, heads * dim)
        h = h + torch.bmm(o, p[f"{a}.output_transform.weight"])

        f = f"{layer}.feed_forward"
        if f"{f}.router.input_transform.weight" in p:
            x = rms_normalize(h, eps) * p[f"{f}.norm.weight"][:, None]
            router = torch.bmm(x, p[f"{f}.router.input_transform.weight"])
            cap = config.experts_router_logits_cap
            probabilities = (cap * torch.tanh(router / cap)).softmax(-1)
            top, chosen = probabilities.topk(config.num_experts_per_token)
            gates = torch.zeros_like(probabilities).scatter(-1, chosen, top / top.sum(-1, keepdim=True))
            balance = balance + ((gates > 0).float().mean(1) * probabilities.mean(1)).sum() * config.num_experts
            e = f"{f}.experts"  # every expert sees every token: simple, and not slow at this size
            gate = torch.einsum("tnh,tehf->tnef", x, p[f"{e}.hidden_transform.linear_0.weight"])
            up = torch.einsum("tnh,tehf->tnef", x, p[f"{e}.hidden_transform.linear_1.weight"])
            x = F.silu(gate) * up * gates[..., None]
            h = h + torch.einsum("tnef,tefh->tnh", x, p[f"{e}.output_transform.weight"])
        else:
            names = (f"{f}.hidden_transform.linear_0", f"{f}.hidden_transform.linear_1")
            gate, up = project(h, f"{f}.norm", *names).chunk(2, -1)
            h = h + torch.bmm(F.silu(gate) * up, p[f"{f}.output_transform.weight"])
    h = rms_normalize(h.mean(0), eps) * p["output_norm.weight"]
    return h @ p["embedding.weight"].T, balance


@torch.no_grad()
def check_fast_logits(config: Config) -> None:
    """Raises unless `fast_logits` agrees with tamm, on a model whose every weight, norms included, is random."""
    state = torch.get_rng_state()  # the check must not change what training draws
    model = config.create_model().eval()
    for p in model.parameters():
        p.add_(0.1 * torch.randn_like(p))
    ids = torch.randint(3, config.vocab_size, (2, 2 * config.local_attention_window_size + 10))
    expected = model(ids).logits.flatten(0, 1)
    error = (fast_logits(dict(model.named_parameters()), config, ids)[0] - expected).abs().max() / expected.std()
    torch.set_rng_state(state)
    if not error < 1e-3:
        raise RuntimeError(f"fast_logits differs from tamm by {error:.2e} standard deviations; expected below 1e-3")
    print(f"fast_logits equals tamm: largest difference {error:.1e} standard deviations", flush=True)


def batches(ids: Tensor, args: argparse.Namespace) -> Iterator[Tensor]:
    """Rows `[batch, seq + 1]`: bos, then consecutive tokens. Each epoch cuts the stream elsewhere and shuffles it."""
    generator = torch.Generator().manual_seed(args.seed)
    while True:
        phase = int(torch.randint(args.seq_len, (), generator=generator))
        rows = ids[phase : phase + (len(ids) - phase) // args.seq_len * args.seq_len].view(-1, args.seq_len)
        if len(rows) < args.batch_size:
            raise ValueError(f"{len(ids)} training tokens found, {args.seq_len * (args.batch_size + 1)} needed")
        for chosen in torch.randperm(len(rows), generator=generator).split(args.batch_size):
            if len(chosen) == args.batch_size:
                yield F.pad(rows[chosen], (1, 0), value=files.BOS_ID)


def train(
    model: torch.nn.Module, config: Config, train_ids: Tensor, held_ids: Tensor, args: argparse.Namespace
) -> tuple[list[dict[str, Any]], float]:
    """Runs what `OPTIMIZER` says. Returns the loss curve and the seconds it took."""
    p = dict(model.named_parameters())
    matrices = [w for name, w in p.items() if "norm" not in name and name != "embedding.weight"]
    others = [w for name, w in p.items() if "norm" in name or name == "embedding.weight"]
    groups = [{"params": matrices, "weight_decay": args.weight_decay}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=args.learning_rate, betas=(0.9, 0.98), fused=True)
    curve: list[dict[str, Any]] = []
    losses: list[float] = []
    start = time.monotonic()
    for step, rows in enumerate(batches(train_ids, args), 1):
        elapsed = time.monotonic() - start
        done = elapsed / (60 * args.minutes) if args.minutes else step / args.steps
        rate = min(done / 0.04, 0.01 + 0.99 * (1 + math.cos(math.pi * min(done, 1.0))) / 2)
        for group in optimizer.param_groups:
            group["lr"] = args.learning_rate * rate
        logits, balance = fast_logits(p, config, rows[:, :-1])
        loss = F.cross_entropy(logits, rows[:, 1:].flatten())
        (loss + ROUTER_BALANCE_WEIGHT * balance).backward()
        torch.nn.utils.clip_grad_norm_(p.values(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        losses.append(loss.item())
        last = done >= 1
        if step % 50 == 0 or last:
            tokens_per_s = step * args.batch_size * args.seq_len / (time.monotonic() - start)
            point = {"step": step, "train_loss": round(sum(losses) / len(losses), 4)}
            losses.clear()
            if step % 500 == 0 or last:
                point["validation_loss"] = round(evaluate(model, config, held_ids, args.seq_len), 4)
            curve.append(point)
            values = "  ".join(f"{k} {v}" for k, v in point.items())
            print(f"{values}  {min(done, 1.0):.0%}  {tokens_per_s:.0f} tokens/s", flush=True)
        if last:
            break
    return curve, time.monotonic() - start


@torch.no_grad()
def evaluate(model: torch.nn.Module, config: Config, ids: Tensor, seq_len: int, reference: bool = False) -> float:
    """Mean loss per token of a stream cut into rows of bos and `seq_len` tokens, by tamm itself if `reference`."""
    p = dict(model.named_parameters())
    model.eval()
    total = 0.0
    for row in ids.split(seq_len):
        row = F.pad(row, (1, 0), value=files.BOS_ID)[None]
        logits = model(row[:, :-1]).logits[0] if reference else fast_logits(p, config, row[:, :-1])[0]
        total += F.cross_entropy(logits, row[0, 1:], reduction="sum").item()
    return total / len(ids)


@torch.no_grad()
def greedy_reference(model: torch.nn.Module, tokenizer: tokenizers.Tokenizer) -> dict[str, Any]:
    """Greedy continuations by tamm, with the smallest lead of a chosen token: what an engine must reproduce."""
    cases = []
    for prompt in PROMPTS:
        input_ids = tokenizer.encode(prompt).ids
        ids, margins = list(input_ids), []
        for _ in range(REFERENCE_TOKENS):
            top = model(torch.tensor([ids])).logits[0, -1].topk(2)
            ids.append(int(top.indices[0]))
            margins.append(float(top.values[0] - top.values[1]))
        output_ids = ids[len(input_ids) :]
        cases.append(
            {
                "prompt": prompt,
                "input_ids": input_ids,
                "output_ids": output_ids,
                "text": tokenizer.decode(output_ids),
                "smallest_margin": round(min(margins), 4),
            }
        )
    about = "Greedy continuations by tamm in float32 from the shipped bfloat16 weights; end of text is not a stop. "
    about += "smallest_margin: least difference, in logits, between the chosen token and the next best."
    return {"about": about, "tamm": tamm_version(), "cases": cases}


@torch.no_grad()
def sample_texts(
    model: torch.nn.Module, config: Config, tokenizer: tokenizers.Tokenizer, seed: int, length: int = 120
) -> list[dict[str, Any]]:
    """A continuation of each prompt, drawn at temperature 0.7 from the 40 likeliest tokens."""
    p = dict(model.named_parameters())
    generator = torch.Generator().manual_seed(seed)
    samples = []
    for prompt in PROMPTS:
        ids = tokenizer.encode(prompt).ids
        for _ in range(length):
            values, indices = fast_logits(p, config, torch.tensor([ids]))[0][-1].topk(40)
            choice = int(indices[torch.multinomial((values / 0.7).softmax(-1), 1, generator=generator)])
            if choice == files.EOS_ID:
                break
            ids.append(choice)
        samples.append({"prompt": prompt, "temperature": 0.7, "top_k": 40, "text": tokenizer.decode(ids)})
    return samples


def cpu_model() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    name = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.machine())
    return f"{name}, {len([line for line in lines if line.startswith('processor')])} logical cores"


def tamm_version() -> str:
    return importlib.metadata.version("tamm")


if __name__ == "__main__":
    main()
