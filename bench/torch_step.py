"""One training step in PyTorch: forward, backward, fused AdamW on f32 master weights.

Prints one JSON line a step; see README.md for the fields. Knows nothing of the other implementations.
"""

import argparse
import json
import os
import resource
import sys
import time

# V vocabulary, D width, L layers, N heads, F feed-forward width, B sequences, T tokens of each.
CONFIGS = {
    "S": dict(V=8192, D=512, L=6, N=8, F=1376, B=4, T=256),
    "M": dict(V=32000, D=768, L=12, N=12, F=2048, B=2, T=512),
    "L": dict(V=32000, D=2048, L=16, N=16, F=5504, B=8, T=2048),
    # The model of the runs with a budget on a GPU (docs/performance.md).
    "offload": dict(V=4096, D=2048, L=16, N=16, F=5504, B=8, T=1024),
    # The model of `cargo xtask bench memory`.
    "memory": dict(V=4096, D=1024, L=8, N=16, F=2752, B=4, T=128),
}
MODES = ("eager-f32", "eager-bf16", "compiled-f32", "compiled-bf16")


def parse_args():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--config", choices=CONFIGS, default="S")
    parser.add_argument("--mode", choices=MODES, default="eager-f32")
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--batch", type=int, help="rows instead of those of the configuration")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--offload", action="store_true", help="masters, moments and updates on the host")
    parser.add_argument("--mapped", metavar="DIR", help="weights and moments lie in files of this folder")
    parser.add_argument("--mapped-gradients", action="store_true", help="with --mapped: gradients, too")
    return parser.parse_args()


args = parse_args()
# OpenMP reads its thread count when torch loads, so it must be known before the import.
os.environ["OMP_NUM_THREADS"] = str(args.threads)

import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402
from torch import nn  # noqa: E402


def rope(x_BNTH, cos_TH, sin_TH):
    """Rotates pairs (i, i + H/2); f32 tables promote, so the caller casts back."""
    a, b = x_BNTH.chunk(2, -1)
    return torch.cat([a * cos_TH - b * sin_TH, b * cos_TH + a * sin_TH], -1)


class Block(nn.Module):
    def __init__(self, D, N, F):
        super().__init__()
        self.heads = N
        self.norm_attn, self.norm_ffn = nn.RMSNorm(D, eps=1e-5), nn.RMSNorm(D, eps=1e-5)
        self.q, self.k, self.v, self.o = (nn.Linear(D, D, bias=False) for _ in range(4))
        self.gate, self.up = nn.Linear(D, F, bias=False), nn.Linear(D, F, bias=False)
        self.down = nn.Linear(F, D, bias=False)

    def forward(self, x_BTD, cos_TH, sin_TH):
        B, T, D = x_BTD.shape
        h_BTD = self.norm_attn(x_BTD)
        q, k, v = (p(h_BTD).view(B, T, self.heads, -1).transpose(1, 2) for p in (self.q, self.k, self.v))
        q, k = rope(q, cos_TH, sin_TH).to(v.dtype), rope(k, cos_TH, sin_TH).to(v.dtype)
        y_BNTH = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x_BTD = x_BTD + self.o(y_BNTH.transpose(1, 2).reshape(B, T, D))
        h_BTD = self.norm_ffn(x_BTD)
        return x_BTD + self.down(F.silu(self.gate(h_BTD)) * self.up(h_BTD))


class Llama(nn.Module):
    def __init__(self, V, D, L, N, F, B, T):
        super().__init__()
        self.embedding = nn.Embedding(V, D)
        self.blocks = nn.ModuleList(Block(D, N, F) for _ in range(L))
        self.norm = nn.RMSNorm(D, eps=1e-5)
        self.head = nn.Linear(D, V, bias=False)
        for p in self.parameters():
            if p.dim() > 1:
                nn.init.normal_(p, std=0.02)
        self.make_tables(T, D // N)

    def make_tables(self, T, H):
        angle_TH = torch.outer(torch.arange(T), 10000.0 ** (-torch.arange(0, H, 2) / H))
        self.register_buffer("cos", angle_TH.cos())
        self.register_buffer("sin", angle_TH.sin())

    def forward(self, ids_BT, targets_BT):
        x_BTD = self.embedding(ids_BT)
        for block in self.blocks:
            x_BTD = block(x_BTD, self.cos, self.sin)
        logits_BTV = self.head(self.norm(x_BTD))
        return F.cross_entropy(logits_BTV.flatten(0, 1).float(), targets_BT.flatten())


def mapped(like, name):
    """Zeros of a shape in a file, whose space is reserved so that a full disk is an error here."""
    path = os.path.join(args.mapped, name)
    with open(path, "wb") as file:
        os.posix_fallocate(file.fileno(), 0, like.numel() * 4)
    return torch.from_file(path, shared=True, size=like.numel(), dtype=torch.float32).view(like.shape)


def mapped_model(c):
    """The model with its weights in files from the start: they are never in memory all at once."""
    with torch.device("meta"):
        model = Llama(**c)
    model.make_tables(c["T"], c["D"] // c["N"])
    for at, module in enumerate(model.modules()):
        for name, like in module._parameters.items():
            if like is None:  # Linear without a bias
                continue
            weights = mapped(like, f"{at}.{name}.weights")
            nn.init.normal_(weights, std=0.02) if like.dim() > 1 else nn.init.ones_(weights)
            module._parameters[name] = nn.Parameter(weights)
    return model


def map_state(model, adamw):
    """Moments of AdamW in files; gradients too when asked for."""
    for at, p in enumerate(model.parameters()):
        moments = {name: mapped(p, f"{at}.{name}") for name in ("exp_avg", "exp_avg_sq")}
        adamw.state[p] = {"step": torch.tensor(0.0), **moments}
        if args.mapped_gradients:
            p.grad = mapped(p, f"{at}.gradient")


class HostAdamW:
    """bf16 weights and gradients on the GPU; f32 masters, moments and the update on the host."""

    def __init__(self, model):
        self.params = list(model.parameters())
        self.masters = [nn.Parameter(p.detach().float().cpu()) for p in self.params]
        self.pinned = [torch.empty(p.shape, dtype=p.dtype, pin_memory=True) for p in self.params]
        self.adamw = torch.optim.AdamW(
            self.masters, lr=3e-4, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1, fused=True
        )

    def step(self):
        for p, here in zip(self.params, self.pinned):
            here.copy_(p.grad, non_blocking=True)
        torch.cuda.synchronize()
        for master, here in zip(self.masters, self.pinned):
            master.grad = here.float()
        self.adamw.step()
        with torch.no_grad():
            for p, master, here in zip(self.params, self.masters, self.pinned):
                here.copy_(master)
                p.copy_(here, non_blocking=True)

    def zero_grad(self, set_to_none=True):
        for p in self.params:
            p.grad = None


def peak_rss_bytes():
    # A compiled run starts helper processes; only this one holds the model.
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def main():
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    c = CONFIGS[args.config]
    if args.batch:
        c = dict(c, B=args.batch)
    compiled, bf16 = args.mode.startswith("compiled"), args.mode.endswith("bf16")

    model = mapped_model(c) if args.mapped else Llama(**c)
    model = model.to(args.device)
    step_fn = torch.compile(model) if compiled else model
    if args.offload:
        model.bfloat16()
        adamw = HostAdamW(model)
    else:
        adamw = torch.optim.AdamW(
            model.parameters(), lr=3e-4, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1, fused=True
        )
    if args.mapped:
        map_state(model, adamw)
    ids = torch.randint(0, c["V"], (c["B"], c["T"] + 1), device=args.device)
    x_BT, y_BT = ids[:, :-1].contiguous(), ids[:, 1:].contiguous()

    n_mat = sum(p.numel() for p in model.parameters() if p.dim() > 1) - c["V"] * c["D"]
    tokens = c["B"] * c["T"]
    flop = (6 * n_mat + 12 * c["L"] * c["T"] * c["D"]) * tokens

    for step in range(args.steps):
        start = time.perf_counter()
        with torch.autocast(args.device, dtype=torch.bfloat16, enabled=bf16):
            loss = step_fn(x_BT, y_BT)
        loss.backward()
        adamw.step()
        adamw.zero_grad(set_to_none=not args.mapped_gradients)
        # Reading the loss waits for the forward pass only.
        if args.device == "cuda":
            torch.cuda.synchronize()
        seconds = time.perf_counter() - start
        line = {
            "impl": f"torch-{args.mode}",
            "step": step,
            "seconds": seconds,
            "tokens_per_s": tokens / seconds,
            "gflops": flop / seconds / 1e9,
            "peak_rss_bytes": peak_rss_bytes(),
            "peak_device_bytes": torch.cuda.max_memory_reserved() if args.device == "cuda" else None,
            "loss": loss.item(),
        }
        print(json.dumps(line), flush=True)


main()
