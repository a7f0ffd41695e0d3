"""The numbers of the data room: speed beside the bare tokenizers library, and peak memory on large text.

    python benchmarks/data/measure.py speed --data ../shared/data            (three minutes on two cores)
    python benchmarks/data/measure.py memory --data ../shared/data           (one minute)
    python benchmarks/data/measure.py large --data ../shared/data            (four minutes, 2 GB of disk)

Each writes its result, with the machine described, to benchmarks/data/<name>.json.
"""

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

HERE = Path(__file__).parent


def machine() -> dict:
    import numpy
    import tokenizers
    import torch

    about = Path("/proc/cpuinfo")
    lines = about.read_text().splitlines() if about.is_file() else []
    model = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.machine())
    versions = {module.__name__: module.__version__ for module in (numpy, tokenizers, torch)}
    return {"cpu": model, "cores": os.cpu_count(), "python": platform.python_version(), **versions}


def speed(data: Path) -> dict:
    from codistill.bench.data import bench_data

    source = data / "text" / "english-novels" / "train-00000-of-00003.parquet"
    vocabulary = data / "vocab" / "bert-base-uncased.txt"
    rows = bench_data([str(source)], str(vocabulary), repeats=3)
    return {"source": "text/english-novels/train-00000-of-00003.parquet", "tokenizer": vocabulary.name, "rows": rows}


def memory(data: Path) -> dict:
    with tempfile.TemporaryDirectory() as folder:
        found = watched([str(data / "text")], str(data / "vocab" / "bert-base-uncased.txt"), f"{folder}/out")
    return {"source": "all of shared/data/text, whole documents"} | found


def large(data: Path) -> dict:
    with tempfile.TemporaryDirectory() as folder:
        path, vocabulary = Path(folder, "synthetic.jsonl"), str(data / "vocab" / "bert-base-uncased.txt")
        size = synthetic(data / "text", path)
        found = watched([str(path)], vocabulary, f"{folder}/out", "unit='sentence', keep_every=4")
    return {"source": "synthetic .jsonl, one sentence of every four", "bytes": size} | found


def synthetic(text: Path, path: Path, size: int = 2_000_000_000) -> int:
    """The real text over and over, as one .jsonl of 2 GB."""
    import pyarrow.parquet as parquet

    tables = [parquet.read_table(file) for file in sorted(text.glob("*/train*.parquet"))]
    lines = "".join(json.dumps({"text": row}) + "\n" for table in tables for row in table["text"].to_pylist()).encode()
    with open(path, "wb") as file:
        while file.tell() < size:
            file.write(lines)
    return path.stat().st_size


def watched(sources: list[str], vocabulary: str, out: str, options: str = "") -> dict:
    """One preparation in a process of its own: seconds, tokens, and the largest sum of resident memory of it and its
    workers, looked at every 50 ms (pages they share are counted for each)."""
    call = f"prepare({sources}, {vocabulary!r}, {out!r}, {options})"
    code = f"from codistill.data.prepare import prepare; print({call}.num_tokens)"
    start, peak = time.monotonic(), 0
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as process:
        done = threading.Event()
        threading.Thread(target=lambda: (process.wait(), done.set()), daemon=True).start()
        while not done.wait(0.05):
            peak = max(peak, resident(process.pid))
        tokens = int(process.stdout.read())
    seconds = time.monotonic() - start
    return {"tokens": tokens, "seconds": round(seconds, 1), "peak_resident_bytes": peak}


def resident(parent: int) -> int:
    """Resident bytes of a process and its children."""
    total = 0
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            fields = dict(line.split(":", 1) for line in (folder / "status").read_text().splitlines())
            if int(folder.name) == parent or int(fields["PPid"]) == parent:
                total += int(fields.get("VmRSS", "0 kB").split()[0]) * 1024
        except (OSError, ValueError):
            continue
    return total


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["speed", "memory", "large"])
    parser.add_argument("--data", type=Path, required=True)
    chosen = parser.parse_args()
    result = {"machine": machine(), **{"speed": speed, "memory": memory, "large": large}[chosen.what](chosen.data)}
    (HERE / f"{chosen.what}.json").write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
