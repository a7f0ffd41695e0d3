"""Peak memory of a ctcd-clm step at a vocabulary of 151,936, beside plain PyTorch that does the same, on a CPU.

    python benchmarks/causal_memory/run.py [--out benchmarks/causal_memory/results.json]

Two Llama-like members of 2 layers × 256 teach one another over 2048 tokens in float32. Each side has a process of its
own: it takes one step, so that the optimizers have their state, and the second is measured: the most resident memory
beyond what was there before it (parameters and optimizer state), less the gradients, which both need. Plain PyTorch is
two Hugging Face models, their whole logits, `cross_entropy` and `kl_div`.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path

import torch
from torch.nn import functional
from torch.optim import AdamW

from codistill.bench.measure import machine, peak_bytes
from codistill.cohort import Cohort, Distillation, Member
from codistill.config import ModelConfig
from codistill.models import Predictor, new_model
from codistill.objectives import Batch
from codistill.schedules import constant

VOCABULARY, LENGTH, SEQUENCES = 151_936, 512, 4
NAMES = ("large", "small")


def new_models():
    config = ModelConfig(family="llama", layers=2, width=256)
    size = {"vocabulary": VOCABULARY, "length": LENGTH, "tokenizer": None, "seed": 0}
    return {name: new_model(config, name=name, **size) for name in NAMES}


def tokens():
    return torch.randint(VOCABULARY, (SEQUENCES, LENGTH), generator=torch.Generator().manual_seed(0))


def cohort_step(models):
    predictors = {name: Predictor(model, VOCABULARY) for name, model in models.items()}
    members = [
        Member(name, p, AdamW(p.parameters(), lr=0.0, fused=True), lr=constant(1e-3)) for name, p in predictors.items()
    ]
    cohort = Cohort(members, [Distillation("large", "small"), Distillation("small", "large")])
    ids = tokens()
    rows = torch.arange(LENGTH - 1) + LENGTH * torch.arange(SEQUENCES)[:, None]
    batch = Batch({"input_ids": ids}, rows.flatten(), ids[:, 1:].flatten())

    def step():
        metrics = cohort.step(0, [batch])
        step.losses = [metrics[f"{name}/hard"].item() for name in NAMES]

    return step


def plain_step(models):
    optimizers = {name: AdamW(model.parameters(), lr=1e-3, fused=True) for name, model in models.items()}
    ids = tokens()
    labels = ids[:, 1:].flatten()

    def step():
        logits = {name: model(ids, use_cache=False).logits[:, :-1].flatten(0, 1) for name, model in models.items()}
        log_p = {name: torch.log_softmax(z, -1) for name, z in logits.items()}
        hard = [functional.nll_loss(log_p[name], labels) for name in NAMES]
        total = sum(hard)
        for name, other in (NAMES, NAMES[::-1]):
            total = total + functional.kl_div(
                log_p[name], log_p[other].detach(), log_target=True, reduction="batchmean"
            )
        total.backward()
        step.losses = [loss.item() for loss in hard]
        del logits, log_p, total, hard
        for name, model in models.items():
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizers[name].step()
            optimizers[name].zero_grad(set_to_none=True)

    return step


def measured(side: str) -> dict:
    models = new_models()
    parameters = sum(p.numel() * 4 for model in models.values() for p in model.parameters())
    step = {"codistill": cohort_step, "plain PyTorch": plain_step}[side](models)
    step()
    peak = peak_bytes(step, "cpu")
    return {"peak_bytes": peak, "beyond_gradients": peak - parameters, "parameters": parameters, "losses": step.losses}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--side")
    parser.add_argument("--out", type=Path, default=Path(__file__).with_name("results.json"))
    arguments = parser.parse_args()
    if arguments.side:
        print(json.dumps(measured(arguments.side)))
        return
    sides = {}
    for side in ("codistill", "plain PyTorch"):
        done = subprocess.run([sys.executable, __file__, "--side", side], check=True, capture_output=True, text=True)
        sides[side] = json.loads(done.stdout.splitlines()[-1])
        print(side, sides[side])
    ratio = sides["codistill"]["beyond_gradients"] / sides["plain PyTorch"]["beyond_gradients"]
    size = {"vocabulary": VOCABULARY, "tokens": SEQUENCES * LENGTH, "layers": 2, "width": 256, "dtype": "float32"}
    results = {"size": size, "sides": sides, "ratio": round(ratio, 4), "machine": machine("cpu", ("transformers",))}
    arguments.out.write_text(json.dumps(results, indent=1) + "\n")
    print(f"ratio {ratio:.3f}")


if __name__ == "__main__":
    main()
