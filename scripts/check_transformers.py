#!/usr/bin/env python3
"""Open a model folder that `trilith` wrote with transformers, and say what is in it.

Prints the architecture, the parameter count and the type of the weights; with --text the mean loss
per token of a file, in windows of --context tokens, in float32 on the CPU; and a greedy sample.

Exits with 1 and the reason when the folder does not open, or when it opens only because
transformers filled in for it: a weight missing and newly initialised, unexpected, or of another
shape than the config says.

    pip install torch transformers
    python scripts/check_transformers.py runs/small/model --text data/held_out.txt --context 512
"""

import argparse
import json
import math
import sys
from pathlib import Path

import torch
import transformers
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer


def fail(reason):
    print(f"check_transformers: {reason}", file=sys.stderr)
    raise SystemExit(1)


def warn(reason):
    print(f"check_transformers: warning: {reason}", file=sys.stderr)


def complaints(info):
    """One line for each kind of weight that did not simply fit."""
    kinds = {
        "missing_keys": "missing from the folder, newly initialised",
        "unexpected_keys": "in the folder, unknown to the architecture",
        "mismatched_keys": "of another shape than the config says",
        "error_msgs": "failed to load",
    }
    for kind, meaning in kinds.items():
        names = sorted(str(name) for name in info.get(kind) or [])
        if names:
            shown = ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "")
            yield f"{len(names)} weights {meaning}: {shown}"


def open_model(folder):
    if not (folder / "config.json").is_file():
        fail(f"{folder} has no config.json; is it a model folder?")
    try:
        model, info = AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch.float32, local_files_only=True, ignore_mismatched_sizes=True,
            output_loading_info=True,
        )
    except Exception as error:  # Whatever transformers raises, the folder is at fault.
        fail(f"{folder} does not open as a model: {type(error).__name__}: {error}")
    if found := list(complaints(info)):
        fail("\n  ".join([f"{folder} does not fit {type(model).__name__}:", *found]))
    broken = [name for name, param in model.named_parameters() if not param.isfinite().all()]
    if broken:
        fail(f"{len(broken)} weights hold values that are not finite: {', '.join(broken[:8])}")
    return model.eval()


def open_tokenizer(folder, vocab):
    # Without files transformers makes up an empty tokenizer of the family's kind.
    if not any((folder / name).is_file() for name in ("tokenizer.json", "tokenizer.model", "vocab.json")):
        fail(f"{folder} has no tokenizer.json; --tokens 0 without --text needs none")
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except Exception as error:
        fail(f"{folder} does not open as a tokenizer: {type(error).__name__}: {error}")
    print(f"tokenizer: {type(tokenizer).__name__}, {len(tokenizer)} tokens of {vocab}")
    if len(tokenizer) > vocab:
        warn(f"the tokenizer has {len(tokenizer)} tokens, the model only {vocab}")
    return tokenizer


def encode(tokenizer, folder, text):
    """Ids of a text, with a warning where tokenizer.json alone, which is what we read, differs."""
    ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    path = folder / "tokenizer.json"
    if path.is_file() and ids != Tokenizer.from_file(str(path)).encode(text, add_special_tokens=False).ids:
        warn(f"{type(tokenizer).__name__} splits the text otherwise than tokenizer.json: losses do not compare")
    return ids


def text_loss(model, ids, context):
    """(targets, summed nats): windows of `context` targets, each predicted from its window alone."""
    targets, nats = 0, 0.0
    for first in range(0, len(ids) - 1, context):
        window = torch.tensor([ids[first:first + context + 1]])
        with torch.no_grad():
            logits = model(window[:, :-1]).logits[0].float()
        nats += torch.nn.functional.cross_entropy(logits, window[0, 1:], reduction="sum").item()
        targets += window.shape[1] - 1
    return targets, nats


def report_loss(model, tokenizer, args):
    path, context = args.text, args.context
    limit = getattr(model.config, "max_position_embeddings", None) or context
    if context > limit:
        fail(f"--context {context} is longer than the {limit} positions of the model")
    text = Path(path).read_text(encoding="utf-8")
    ids = encode(tokenizer, args.folder, text)
    if len(ids) < 2:
        fail(f"{path} holds {len(ids)} tokens; a loss needs at least 2")
    targets, nats = text_loss(model, ids, context)
    mean, bits = nats / targets, nats / math.log(2) / len(text.encode())
    print(f"loss: {mean:.6f} nats per token over {targets} tokens, perplexity {math.exp(mean):.3f}, "
          f"{bits:.4f} bits per byte")


def sample(model, tokenizer, args):
    """Greedy, so that it can be compared with ours."""
    ids = torch.tensor([encode(tokenizer, args.folder, args.prompt)])
    if ids.shape[1] == 0:
        fail("--prompt holds no tokens")
    written = model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=args.tokens, do_sample=False,
        pad_token_id=tokenizer.eos_token_id or 0,
    )
    print(f"sample: {json.dumps(tokenizer.decode(written[0]), ensure_ascii=False)}")


def arguments():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("folder", type=Path, help="folder with config.json, weights and tokenizer")
    parser.add_argument("--prompt", default="Once upon a time", help="text the sample continues")
    parser.add_argument("--tokens", type=int, default=32, help="tokens of the sample; 0: none")
    parser.add_argument("--text", help="file whose loss is measured")
    parser.add_argument("--context", type=int, default=512, help="tokens a window (default: 512)")
    args = parser.parse_args()
    if args.context < 1 or args.tokens < 0:
        parser.error("--context must be at least 1 and --tokens at least 0")
    return args


def main():
    args = arguments()
    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
    model = open_model(args.folder)
    params = sum(param.numel() for param in model.parameters())
    written = json.loads((args.folder / "config.json").read_text())
    dtype = written.get("dtype") or written.get("torch_dtype") or "unnamed"
    print(f"transformers: {transformers.__version__}, torch {torch.__version__}")
    print(f"architecture: {type(model).__name__}, {params:,} parameters, written as {dtype}")
    if not (args.text or args.tokens):
        return
    tokenizer = open_tokenizer(args.folder, model.config.vocab_size)
    if args.text:
        report_loss(model, tokenizer, args)
    if args.tokens:
        sample(model, tokenizer, args)


if __name__ == "__main__":
    main()
