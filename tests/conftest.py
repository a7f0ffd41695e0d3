"""Every test worker computes on one thread: two workers fill two cores, and results do not depend on their number."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
