"""Side-by-side measurements: ours, plain PyTorch, and the peers that are installed."""

from codistill.bench.data import bench_data
from codistill.bench.loss import bench_loss

__all__ = ["bench_data", "bench_loss"]
