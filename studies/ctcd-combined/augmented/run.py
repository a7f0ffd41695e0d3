"""Co-distillation in the place of one-way distillation, in fine-tuning on augmented data.

    python studies/ctcd-combined/augmented/run.py --data DATA --out OUT [--seeds 5]
    python studies/ctcd-combined/augmented/run.py --out OUT --table

For each seed a large and a small masked LM are pre-trained apart (the `alone` arms of the study, scale tiny, one pass),
then fine-tuned on the same examples of a GLUE task: alone, one-way (large → small, both learning the task) and both
ways; on the examples as they are and on augmented ones, for equally many steps. What is finished is not done again.
Writes OUT/results.json and, into OUT/README.md, the table of it.
"""

import argparse
import json
from collections.abc import Sequence
from dataclasses import asdict, replace
from datetime import date
from pathlib import Path

import numpy as np
import torch
from pyarrow import Table, parquet
from words import augmented

from codistill.bench.measure import machine
from codistill.blocks import Table as Rows
from codistill.blocks import to_markdown
from codistill.evaluate.compare import holm, t_interval, t_probability
from codistill.evaluate.protocol import Protocol
from codistill.evaluate.run import evaluate
from codistill.evaluate.subjects import load_subject
from codistill.files import write_file
from codistill.study.design import ONE_PASS
from codistill.study.grids import STUDIES
from codistill.study.run import Request, means
from codistill.study.scales import SCALES
from codistill.train import train

TASK, EXAMPLES, COPIES = "sst2", 2000, 3
# Equally many steps: about 8 epochs of the examples, or 2 of the augmented ones, which are 4 times as many.
PROTOCOLS = {"plain": Protocol(epochs=8, max_steps=500), "augmented": Protocol(epochs=2, max_steps=500)}
WAYS = {"alone": [], "one-way": ["large:small"], "both": ["large:small", "small:large"]}
# Fixed before the first number was there: (treated, control), each (text, way, member).
CONTRASTS = [
    *(((text, "both", "small"), (text, "one-way", "small")) for text in PROTOCOLS),
    *(((text, way, "small"), (text, "alone", "small")) for text in PROTOCOLS for way in ("one-way", "both")),
    *(((text, "both", "large"), (text, "alone", "large")) for text in PROTOCOLS),
    *((("augmented", way, "small"), ("plain", way, "small")) for way in WAYS),
]


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--data", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--table", action="store_true", help="only write the table of OUT/results.json anew")
    asked = parser.parse_args()
    if not asked.table:
        found = {
            "made": date.today().isoformat(),
            "machine": machine("cpu", ("codistill", "transformers", "tokenizers")),
            "task": TASK,
            "examples": EXAMPLES,
            "copies": COPIES,
            "protocols": {text: asdict(protocol) for text, protocol in PROTOCOLS.items()},
            "cells": [cell for seed in range(asked.seeds) for cell in cells_of(seed, asked.data, asked.out)],
        }
        write_file(asked.out / "results.json", json.dumps(found, indent=1) + "\n")
    write_table(asked.out)


def cells_of(seed: int, data: Path, out: Path) -> list[dict]:
    """Everything of one seed."""
    pair = pre_trained(seed, data, out / f"seed-{seed}" / "pair")
    folders = {text: out / f"seed-{seed}" / text for text in PROTOCOLS}
    examples = some_of(data / "glue" / TASK / "train.parquet", seed)
    if not (folders["augmented"] / "glue").exists():
        dev = parquet.read_table(data / "glue" / TASK / "dev.parquet")
        more = with_copies(examples, pair / "members" / "large", seed)
        for text, rows in (("plain", examples), ("augmented", more)):
            write_task(folders[text], rows, dev)
    cells = []
    for text, protocol in PROTOCOLS.items():
        for way, edges in WAYS.items():
            print(f"seed {seed}: {text}, {way}", flush=True)
            distill = [":".join(f"pair/{role}" for role in edge.split(":")) for edge in edges]
            # One folder for all ways, so that what is alone is fine-tuned once.
            scored = evaluate(
                [str(pair)], [f"glue/{TASK}"], folders[text] / "scores", data=folders[text], distill=distill,
                protocol=protocol,
            )  # fmt: skip
            cells += [cell_of(cell, seed, text, way) for cell in scored["cells"] if is_of(cell, way)]
    return cells


def pre_trained(seed: int, data: Path, out: Path) -> Path:
    """The run of the two models; without an edge they learn as if each were alone, from the same batches."""
    study, scale = STUDIES["ctcd-combined"], SCALES["tiny"]
    arm = next(arm for arm in study.arms(scale, seed) if arm.regime == ONE_PASS and arm.name == "both")
    text = means(Request(study, scale, 1, out), data, 1, ["cpu"]).data
    of_text = replace(arm.run.data, train=text.train, validation=text.validation)
    if not (out / "results.json").exists():
        print(f"seed {seed}: pre-training", flush=True)
        train(replace(arm.run, distillation=[], data=of_text), out, resume=(out / "run.yaml").exists())
    return out


def some_of(file: Path, seed: int) -> Table:
    """`EXAMPLES` of the training set, others for each seed."""
    table = parquet.read_table(file)
    return table.take(np.random.default_rng([seed, 0]).permutation(len(table))[:EXAMPLES])


def with_copies(examples: Table, model: Path, seed: int) -> Table:
    """The examples and `COPIES` of each with other words and the same label."""
    subject = load_subject("large", str(model), torch.device("cpu"))
    sentences, labels = examples["sentence"].to_pylist(), examples["label"].to_pylist()
    copies = augmented(sentences, subject, copies=COPIES, seed=seed)
    texts = [text for sentence, others in zip(sentences, copies, strict=True) for text in (sentence, *others)]
    return Table.from_pydict({"sentence": texts, "label": np.repeat(labels, 1 + COPIES)})


def write_task(folder: Path, train_rows: Table, dev: Table) -> None:
    """A folder as `codistill evaluate --data` takes it."""
    (folder / "glue" / TASK).mkdir(parents=True)
    parquet.write_table(train_rows, folder / "glue" / TASK / "train.parquet")
    parquet.write_table(dev, folder / "glue" / TASK / "dev.parquet")


def is_of(cell: dict, way: str) -> bool:
    """Whether a cell is one of those that this call was made for: the taught, or where there are none the lone."""
    return ("taught by" in cell["model"]) == (way != "alone")


def cell_of(cell: dict, seed: int, text: str, way: str) -> dict:
    """The score of a member."""
    member = cell["model"].split()[0].removeprefix("pair/")
    kept = {"steps": cell["counted"]["steps"]} if not cell["failed"] else {}
    return {"seed": seed, "text": text, "way": way, "member": member, "score": cell["score"],
            "failed": cell["failed"], **kept}  # fmt: skip


# ---- the table -----------------------------------------------------------------------------------


def write_table(out: Path) -> None:
    """Writes the table into OUT/README.md, between its marks."""
    begin, end = "<!-- the table, generated -->\n", "<!-- end of the table -->"
    page = out / "README.md"
    text = page.read_text() if page.exists() else begin + end
    before, rest = text.split(begin)
    write_file(page, before + begin + "\n" + table_of(json.loads((out / "results.json").read_text())) + "\n" + end
               + rest.split(end)[1])  # fmt: skip


def table_of(found: dict) -> str:
    """Accuracies, then the contrasts in points of accuracy, paired by seed."""
    scores: dict[tuple, dict[int, float]] = {}
    for cell in found["cells"]:
        if not cell["failed"]:
            scores.setdefault((cell["text"], cell["way"], cell["member"]), {})[cell["seed"]] = 100 * cell["score"]
    rows = [[*arm, str(len(by)), spread(list(by.values()))] for arm, by in scores.items()]
    arms = Rows(["fine-tuned on", "way", "member", "seeds", "accuracy, %"], rows, words=(0, 1, 2))
    return to_markdown([arms, contrasts_of(scores)])


def contrasts_of(scores: dict[tuple, dict[int, float]]) -> Rows:
    """Rows of differences; "by Holm too" where they are shown all together."""
    differences = {}
    for treated, control in CONTRASTS:
        seeds = sorted(scores[treated].keys() & scores[control].keys())
        differences[treated, control] = [scores[treated][seed] - scores[control][seed] for seed in seeds]
    together = holm([t_probability(found) for found in differences.values()])
    rows = []
    for ((treated, control), found), by_holm in zip(differences.items(), together, strict=True):
        low, high = t_interval(found)
        shown = "not shown" if low <= 0 <= high else "higher" if low > 0 else "lower"
        rows.append([f"{' '.join(treated)} − {' '.join(control)}", str(len(found)), f"{np.mean(found):+.2f}",
                     f"[{low:+.2f}, {high:+.2f}]", shown + (", by Holm too" if by_holm else "")])  # fmt: skip
    return Rows(["treated − control", "seeds", "Δ accuracy, points", "95 % interval", "shown"], rows, words=(0, 3, 4))


def spread(values: Sequence[float]) -> str:
    return f"{np.mean(values):.1f} ± {np.std(values, ddof=1):.1f}" if len(values) > 1 else f"{values[0]:.1f}"


if __name__ == "__main__":
    main()
