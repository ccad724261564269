"""Times PyTorch's gloo collectives for `cargo xtask bench comm`: `gloo.py RANKS BYTES ITERATIONS`.

One JSON line an op with the median seconds of an iteration, taken on rank 0 between barriers.
An op that gloo lacks is left out.
"""

import json
import os
import statistics
import sys
import tempfile
import time

import torch
import torch.distributed as dist
import torch.multiprocessing as mp


def rank_main(rank, ranks, size, iterations, meet):
    torch.set_num_threads(1)
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    dist.init_process_group("gloo", init_method=f"file://{meet}", rank=rank, world_size=ranks)
    piece = size // 4 // ranks
    whole, part = torch.ones(piece * ranks), torch.ones(piece)
    ops = {
        "all_reduce": lambda: dist.all_reduce(whole),
        "all_gather": lambda: dist.all_gather_into_tensor(whole, part),
        "reduce_scatter": lambda: dist.reduce_scatter_tensor(part, whole),
        "broadcast": lambda: dist.broadcast(whole, 0),
    }
    for name, call in ops.items():
        try:
            call()
        except (RuntimeError, NotImplementedError):
            continue
        seconds = []
        for _ in range(iterations):
            dist.barrier()
            start = time.perf_counter()
            call()
            seconds.append(time.perf_counter() - start)
        if rank == 0:
            print(json.dumps({"op": name, "seconds": statistics.median(seconds)}), flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    ranks, size, iterations = map(int, sys.argv[1:4])
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(rank_main, (ranks, size, iterations, f"{folder}/meet"), nprocs=ranks)
