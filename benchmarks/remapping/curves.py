"""One learning curve at `tiny` of each start × {DWT, none} × two learning rates.

    python benchmarks/remapping/curves.py WEAK NARROW TEXT VALIDATION > curves.yaml && codistill train curves.yaml

The starts are random, repeat-last, stack, interpolate and replicate. WEAK is a trained model of 4 layers × 128
(teacher, and source of the depth methods), NARROW one of 6 layers × 64 (source of `replicate`), with one tokenizer.
All twenty students of 6 layers × 128 see the same batches in one cohort. Prints the configuration; a first look, one
run each: the study with seeds is another matter.
"""

import sys

import yaml

STARTS = {
    "random": None,
    "repeat-last": {"from": "WEAK", "depth": "repeat-last"},
    "stack": {"from": "WEAK", "depth": "stack"},
    "interpolate": {"from": "WEAK", "depth": "interpolate"},
    # Equal copies stay equal without dropout; the noise keeps the function and lets them part.
    "replicate": {"from": "NARROW", "width": "replicate", "noise": 0.1},
}
RATES = {"fast": 3e-3, "slow": 1e-3}


def configuration(weak: str, narrow: str, text: str, validation: str) -> dict:
    sources = {"WEAK": weak, "NARROW": narrow}
    members: dict[str, dict] = {"weak": {"path": weak, "frozen": True}}
    edges = []
    for start, init in STARTS.items():
        for speed, rate in RATES.items():
            alone, taught = f"{start}-{speed}-alone", f"{start}-{speed}-dwt"
            member = {"model": {"layers": 6, "width": 128}, "lr": {"warmup_linear": [rate, 0.05]}}
            if init:
                member["init"] = {**init, "from": sources[init["from"]]}
            members[alone] = member
            members[taught] = {"twin_of": alone}
            edges.append({"teacher": "weak", "student": taught})
    return {
        "objective": {"mask_rate": 0.3},
        "data": {"train": [text], "validation": [validation], "length": 64},
        "members": members,
        "distillation": edges,
        "steps": 300,
        "batch": {"sequences": 32},
        "evaluate": {"every": 50, "sequences": 512},
        "checkpoint": {"every": 100, "keep": 1},
    }


if __name__ == "__main__":
    print(yaml.safe_dump(configuration(*sys.argv[1:]), sort_keys=False))
