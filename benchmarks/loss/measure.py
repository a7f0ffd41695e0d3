"""All measurements of docs/loss.md: `python benchmarks/loss/measure.py cpu` (in slices of minutes) or `gpu` (one go).

`cpu NAME` runs one slice. Each has plain PyTorch in it, so that ratios are of one run; results lie beside this file.
"""

import json
import sys
import time
from pathlib import Path

import torch

from codistill.bench import bench_loss
from codistill.bench.measure import machine
from codistill.kernels.head import Head, multiply, multiply_add

HERE = Path(__file__).parent
OURS = ["bare products", "plain", "ours, chunked"]
CPU = {
    "cpu-float32": {"providers": OURS, "runs": 7},
    "cpu-float32-memory": {"providers": ["plain", "ours, chunked"], "runs": 1},
    "cpu-float32-liger": {"providers": ["plain", "ours, chunked", "liger chunked, eager"], "runs": 3, "rows": 512},
    "cpu-float32-other": {"providers": ["plain", "plain, compiled", "torch, hard only, 512"], "runs": 3},
    "cpu-float32-all-rows": {"providers": ["plain", "plain, all rows", "ours, chunked"], "runs": 3, "rows": 1024},
    "cpu-bfloat16": {"providers": OURS, "runs": 7, "dtype": "bfloat16"},
}
GPU = {
    "gpu-30522": {"rows": 19_660, "vocabulary": 30_522, "runs": 30},
    "gpu-128256": {"rows": 19_660, "vocabulary": 128_256, "runs": 15},
    "gpu-256000": {"rows": 65_536, "vocabulary": 256_000, "runs": 3, "providers": ["bare products", "ours, triton"]},
}


def shapes(vocabulary: int = 30_522, width: int = 768) -> None:
    """TFLOP/s of the three products of a trained member by rows of a chunk, on the GPU in bfloat16."""
    found = []
    for rows in (512, 1024, 2048, 4096, 8192):
        hidden, weight = torch.randn(rows, width, device="cuda"), torch.randn(vocabulary, width, device="cuda")
        with torch.autocast("cuda", torch.bfloat16):
            head = Head(hidden, weight, None, vocabulary, rows, (True, True, False))
        x, g, out = hidden.bfloat16(), head.gradient(rows), torch.empty(rows, width, device="cuda")
        products = {
            "logits": lambda head=head, rows=rows: head.logits(slice(0, rows)),
            "d_hidden": lambda g=g, head=head, out=out: multiply(g, head.operand_VD, out),
            "d_weight": lambda g=g, head=head, x=x: multiply_add(head.d_weight_VD, g.T, x),
        }
        flops = 2 * rows * width * vocabulary
        found.append({"rows": rows} | {name: flops / _seconds(work) / 1e12 for name, work in products.items()})
        print(found[-1])
    result = {"setting": {"vocabulary": vocabulary, "width": width}, "machine": machine("cuda"), "tflops": found}
    (HERE / "gpu-shapes.json").write_text(json.dumps(result, indent=1) + "\n")


def _seconds(work, runs: int = 30) -> float:
    work()
    torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(runs):
        work()
    torch.cuda.synchronize()
    return (time.perf_counter() - start) / runs


def main(device: str, *names: str) -> None:
    if device == "gpu":
        shapes()
    for name, setting in {"cpu": CPU, "gpu": GPU}[device].items():
        if names and name not in names:
            continue
        options = {"dtype": "bfloat16"} if device == "gpu" else {}
        target = {"gpu": "cuda"}.get(device, device)
        bench_loss(device=target, out=HERE / f"{name}.json", **(options | setting))


if __name__ == "__main__":
    main(*sys.argv[1:])
