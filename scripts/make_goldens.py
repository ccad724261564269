#!/usr/bin/env python3
"""Write the golden models that crates/model/tests/golden.rs is held against.

For each family a tiny random model, as `save_pretrained` writes it, lies in
crates/model/tests/golden/<family>/ beside golden.safetensors, which holds what transformers (eager
attention, float32, CPU) computed with it:

    ids           [B, T]     input tokens
    logits        [B, T, V]
    loss          [1]        mean cross-entropy in nats over the next tokens, B * (T - 1) of them
    prompt        [P]        the first tokens of row 0
    continuation  [12]       greedy tokens after the prompt
    grad.<name>              gradient of the loss, one for each parameter of the folder

The versions that wrote it stand in its metadata. Weights are seeded, norm weights and biases too
are random: nothing is at a value under which a mistake would not show.

    pip install torch transformers
    python scripts/make_goldens.py [family ...]
"""

import json
import sys
from pathlib import Path

import torch
import transformers
from safetensors.torch import save_file
from transformers import (
    AutoModelForCausalLM, GPT2Config, LlamaConfig, MistralConfig, MixtralConfig, Qwen2Config, Qwen2MoeConfig,
    Qwen3Config, Qwen3MoeConfig,
)

ROOT = Path(__file__).resolve().parent.parent / "crates/model/tests/golden"
VOCAB, ROWS, TOKENS, PROMPT, CONTINUATION = 96, 2, 24, 8, 12
# Greedy tokens are compared exactly: the runner-up must be further away than rounding reaches.
MARGIN = 1e-2

COMMON = dict(vocab_size=VOCAB, num_hidden_layers=2, max_position_embeddings=256, bos_token_id=1, eos_token_id=2)
# GPT-2 spells everything differently and has dropout, which would be on while gradients are taken.
GPT2 = dict(
    vocab_size=VOCAB, n_layer=2, n_positions=32, bos_token_id=1, eos_token_id=1,
    resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
)


def rope(theta, **scaling):
    return {"rope_theta": theta, "rope_type": "default", **scaling}


# Wavelengths are 6.3, 26, 107, ...: below 64 / 4, on the ramp, and above 64 / 1.
LLAMA3_ROPE = rope(
    5000.0, rope_type="llama3", factor=4.0, low_freq_factor=1.0, high_freq_factor=4.0,
    original_max_position_embeddings=64,
)
CONFIGS = {
    "llama2": LlamaConfig(
        **COMMON, hidden_size=48, intermediate_size=56, num_attention_heads=4, num_key_value_heads=4,
        rms_norm_eps=1e-5, tie_word_embeddings=False, rope_parameters=rope(10000.0),
    ),
    "llama3": LlamaConfig(
        **COMMON, hidden_size=48, intermediate_size=56, num_attention_heads=4, num_key_value_heads=2,
        rms_norm_eps=1e-5, tie_word_embeddings=False, rope_parameters=LLAMA3_ROPE,
    ),
    "smollm2": LlamaConfig(
        **COMMON, hidden_size=48, intermediate_size=64, num_attention_heads=6, num_key_value_heads=2,
        rms_norm_eps=1e-5, tie_word_embeddings=True, rope_parameters=rope(100000.0),
    ),
    "mistral": MistralConfig(
        **COMMON, hidden_size=48, intermediate_size=56, num_attention_heads=4, num_key_value_heads=2,
        rms_norm_eps=1e-5, tie_word_embeddings=False, sliding_window=7, rope_parameters=rope(10000.0),
    ),
    "qwen2": Qwen2Config(
        **COMMON, hidden_size=48, intermediate_size=64, num_attention_heads=4, num_key_value_heads=2,
        rms_norm_eps=1e-6, tie_word_embeddings=True, rope_parameters=rope(1000000.0),
    ),
    "qwen3": Qwen3Config(
        **COMMON, hidden_size=40, intermediate_size=56, num_attention_heads=4, num_key_value_heads=2,
        head_dim=16, rms_norm_eps=1e-6, tie_word_embeddings=False, rope_parameters=rope(1000000.0),
    ),
    "gpt2": GPT2Config(**GPT2, n_embd=48, n_head=4, n_inner=80),
    # Load-balancing losses are not in the loss below; their factor is 0 on our side too.
    "mixtral": MixtralConfig(
        **COMMON, hidden_size=40, intermediate_size=24, num_attention_heads=4, num_key_value_heads=2,
        num_local_experts=4, num_experts_per_tok=2, router_aux_loss_coef=0.0, rope_parameters=rope(10000.0),
    ),
    "qwen2_moe": Qwen2MoeConfig(
        **COMMON, hidden_size=40, intermediate_size=56, num_attention_heads=4, num_key_value_heads=2,
        num_experts=5, num_experts_per_tok=3, moe_intermediate_size=16, shared_expert_intermediate_size=24,
        norm_topk_prob=False, router_aux_loss_coef=0.0, mlp_only_layers=[0], rope_parameters=rope(10000.0),
    ),
    "qwen3_moe": Qwen3MoeConfig(
        **COMMON, hidden_size=40, intermediate_size=56, num_attention_heads=4, num_key_value_heads=2, head_dim=16,
        num_experts=6, num_experts_per_tok=2, moe_intermediate_size=16, norm_topk_prob=True,
        router_aux_loss_coef=0.0, rope_parameters=rope(1000000.0),
    ),
}
# Written as several files with an index.
SHARDED = {"llama3": "80KB"}
# Written with `rope_theta` and `rope_scaling` at the top, as before transformers 5.
OLD_ROPE = {"smollm2"}


def randomize(model, seed):
    """Give every parameter random values; the scales keep the logits within a few units."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, param in sorted(model.named_parameters()):
            noise = torch.randn(param.shape, generator=generator)
            if param.ndim >= 2:
                param.copy_(0.15 * noise)
            elif name.endswith("bias"):
                param.copy_(0.1 * noise)
            else:
                param.copy_(1.0 + 0.2 * noise)


def save(model, family, folder):
    """The folder as transformers writes it, less what nothing here reads."""
    model.save_pretrained(folder, max_shard_size=SHARDED.get(family, "5GB"))
    (folder / "generation_config.json").unlink(missing_ok=True)
    if family in OLD_ROPE:
        path = folder / "config.json"
        config = json.loads(path.read_text())
        config["rope_theta"] = config.pop("rope_parameters")["rope_theta"]
        config["rope_scaling"] = None
        config["torch_dtype"] = config.pop("dtype")
        path.write_text(json.dumps(config, indent=2) + "\n")


def greedy(model, prompt):
    """Continue by the likeliest token, each time from the whole sequence: no cache to trust."""
    ids, least = prompt.tolist(), float("inf")
    with torch.no_grad():
        for _ in range(CONTINUATION):
            best = model(torch.tensor([ids])).logits[0, -1].topk(2)
            least = min(least, (best.values[0] - best.values[1]).item())
            ids.append(best.indices[0].item())
    return ids[len(prompt):], least


def as_stored(family, name, grad):
    """(name in the folder, gradient) of a parameter: transformers holds experts in one array each."""
    mixtral = family == "mixtral"
    if mixtral:
        name = name.replace(".mlp.", ".block_sparse_moe.")
    gate, up, down = ("w1", "w3", "w2") if mixtral else ("gate_proj", "up_proj", "down_proj")
    for expert, each in enumerate(grad if grad.ndim == 3 else ()):
        folder = name.rsplit(".", 1)[0] + f".{expert}"
        if name.endswith("gate_up_proj"):
            first, second = each.chunk(2)
            yield f"{folder}.{gate}.weight", first
            yield f"{folder}.{up}.weight", second
        else:
            yield f"{folder}.{down}.weight", each
    if grad.ndim < 3:
        yield name, grad


def golden(model, seed):
    """Tensors of golden.safetensors."""
    generator = torch.Generator().manual_seed(seed + 1)
    ids = torch.randint(0, VOCAB, (ROWS, TOKENS), generator=generator)
    logits = model(ids).logits
    targets = ids[:, 1:].reshape(-1)
    loss = torch.nn.functional.cross_entropy(logits[:, :-1].reshape(-1, VOCAB), targets)
    model.zero_grad()
    loss.backward()
    continuation, margin = greedy(model, ids[0, :PROMPT])
    tensors = {
        "ids": ids.int(),
        "logits": logits.detach(),
        "loss": loss.detach().reshape(1),
        "prompt": ids[0, :PROMPT].int(),
        "continuation": torch.tensor(continuation, dtype=torch.int32),
    }
    # A tied head is one parameter, which `named_parameters` yields once, by its embedding's name.
    grads = {}
    for name, param in model.named_parameters():
        for stored, grad in as_stored(model.config.model_type, name, param.grad):
            grads[f"grad.{stored}"] = grad
    return {name: tensor.clone().contiguous() for name, tensor in {**tensors, **grads}.items()}, margin


def write(family, config, seed):
    """Write one folder; returns whether its greedy tokens are clear of rounding."""
    folder = ROOT / family
    folder.mkdir(parents=True, exist_ok=True)
    for old in folder.iterdir():
        old.unlink()
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").float()
    randomize(model, seed)
    save(model, family, folder)
    # What is compared is the folder, after whatever `save` did to it.
    model = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager", dtype=torch.float32)
    tensors, margin = golden(model.eval(), seed)
    # One entry: safetensors writes several in any order, and the files would differ at every run.
    made_by = f"torch {torch.__version__}, transformers {transformers.__version__}, seed {seed}"
    save_file(tensors, folder / "golden.safetensors", metadata={"made_by": made_by})
    for path in folder.iterdir():
        path.chmod(0o644)
    size = sum(path.stat().st_size for path in folder.iterdir())
    print(f"{family}: seed {seed}, loss {tensors['loss'].item():.4f}, margin {margin:.3f}, {size / 1024:.0f} KiB")
    return margin >= MARGIN


def main():
    torch.set_num_threads(1)
    transformers.utils.logging.disable_progress_bar()
    for index, (family, config) in enumerate(CONFIGS.items()):
        if len(sys.argv) == 1 or family in sys.argv[1:]:
            seed = 100 * (index + 1)
            while not write(family, config, seed):
                seed += 1


if __name__ == "__main__":
    main()
