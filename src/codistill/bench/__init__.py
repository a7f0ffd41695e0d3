"""Side-by-side measurements: ours, plain PyTorch, and the peers that are installed."""

from codistill.bench.data import bench_data
from codistill.bench.latency import bench_latency
from codistill.bench.loss import bench_loss
from codistill.bench.step import bench_step

__all__ = ["bench_data", "bench_latency", "bench_loss", "bench_step"]
