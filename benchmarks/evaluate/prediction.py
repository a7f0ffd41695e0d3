"""Prediction with trimmed padding and bucketed lengths, beside a loop that pads every text to 128; and BLiMP.

    python benchmarks/evaluate/prediction.py DATA [OUT.json] [--blimp PAIRS_A_PARADIGM]

DATA is a folder with glue/cola/dev.parquet and so on. The model is a random ModernBERT of 2 layers × 128 with 8192
words: what is timed does not depend on what it has learned.
"""

import argparse
import json
import time
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from codistill.attention import use_short_attention
from codistill.bench.measure import interleaved, machine, summary
from codistill.build import best_precision
from codistill.config import ModelConfig
from codistill.data.tokenizers import train_tokenizer
from codistill.evaluate.blimp import encode_sentences, likelihoods, read_pairs
from codistill.evaluate.encode import encode
from codistill.evaluate.finetune import predict
from codistill.evaluate.sequences import SequencePredictor
from codistill.evaluate.tasks import GLUE, read_split
from codistill.models import Predictor, new_model

LENGTH, WORDS = 128, 8192


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("data", type=Path)
    parser.add_argument("out", type=Path, nargs="?")
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--blimp", type=int, default=20)
    asked = parser.parse_args()
    pairs = read_pairs(asked.data, asked.blimp)
    splits = {name: read_split(asked.data, name, "dev") for name in ("cola", "sst2", "mrpc", "stsb", "rte")}
    texts = [text for examples in splits.values() for column in examples.texts for text in column]
    tokenizer = train_tokenizer("wordpiece", WORDS, [*texts, *pairs.good])
    torch.manual_seed(0)
    config = ModelConfig(family="modernbert", layers=2, width=128)
    model = new_model(config, vocabulary=WORDS, length=LENGTH, tokenizer=tokenizer, seed=0, name="model").eval()
    precision = getattr(torch, best_precision(torch.device("cpu")))
    found = {"machine": machine("cpu", ("transformers",)), "model": "ModernBERT 2 x 128, 8192 words", "tasks": {}}
    found["precision"] = str(precision)
    for name, examples in splits.items():
        found["tasks"][name] = compare(model, tokenizer, name, examples.texts, precision, asked.runs)
        print(name, found["tasks"][name]["ratio"])
    found["all"] = together(found["tasks"].values())
    print("all", found["all"])
    found["blimp"] = time_blimp(model, tokenizer, pairs, precision)
    print(found["blimp"])
    if asked.out:
        asked.out.write_text(json.dumps(found, indent=1) + "\n")


def compare(model, tokenizer, name: str, texts, precision: torch.dtype, runs: int) -> dict:
    """Seconds of both, and how far their outputs are apart."""
    ours, theirs = (
        SequencePredictor(model, GLUE[name].outputs, pooling="mean", dropout=0.0, seed=0).eval() for _ in range(2)
    )
    use_short_attention(ours.backbone)  # as codistill.evaluate.subjects does
    encoded = encode(texts, tokenizer, max_length=LENGTH, with_types=False)
    steps = {
        "ours": lambda: predict(ours, encoded, precision),
        "padded": lambda: pad_everything(theirs, encoded, precision),
    }
    seconds = interleaved(steps, runs, "cpu")
    medians = {who: summary(each)["median"] for who, each in seconds.items()}
    classes = GLUE[name].classes
    # That both predict the same is looked at in float32: in bfloat16 an untrained head's near ties fall either way.
    exact = predict(ours, encoded, torch.float32), pad_everything(theirs, encoded, torch.float32)
    return {
        "examples": len(encoded),
        "mean_tokens": float(encoded.length_N.mean()),
        "seconds": {who: summary(each) for who, each in seconds.items()},
        "examples_per_second": {who: len(encoded) / median for who, median in medians.items()},
        "ratio": medians["padded"] / medians["ours"],
        "largest_difference_float32": float(np.abs(exact[0] - exact[1]).max()),
        "same_classes_float32": float((exact[0].argmax(1) == exact[1].argmax(1)).mean()) if classes else None,
    }


def together(tasks) -> dict:
    """Examples a second over all tasks."""
    count = sum(task["examples"] for task in tasks)
    seconds = {who: sum(task["seconds"][who]["median"] for task in tasks) for who in ("ours", "padded")}
    speeds = {who: count / each for who, each in seconds.items()}
    return {"examples": count, "examples_per_second": speeds, "ratio": speeds["ours"] / speeds["padded"]}


@torch.inference_mode()
def pad_everything(predictor: SequencePredictor, encoded, precision: torch.dtype, batch: int = 32) -> np.ndarray:
    """The common loop: batches of 32 in the order of the file, all padded to 128."""
    found = []
    for at in range(0, len(encoded), batch):
        ids = torch.full((min(batch, len(encoded) - at), LENGTH), encoded.pad)
        for row, one in enumerate(encoded.ids[at : at + batch]):
            ids[row, : len(one)] = torch.from_numpy(one)
        mask = torch.arange(LENGTH) < torch.from_numpy(encoded.length_N[at : at + batch])[:, None]
        inputs: dict[str, Tensor] = {"input_ids": ids, "attention_mask": mask.long()}
        with torch.autocast("cpu", precision, enabled=precision != torch.float32):
            features = predictor(inputs, torch.arange(len(ids)))
        found.append((features.float() @ predictor.output_weight.T + predictor.output_bias).numpy())
    return np.concatenate(found)


def time_blimp(model, tokenizer, pairs, precision: torch.dtype) -> dict:
    """Seconds for these pairs, and at that rate for all 67,000."""
    start = time.perf_counter()
    sentences = encode_sentences([*pairs.good, *pairs.bad], tokenizer, is_causal=False, max_length=LENGTH)
    predictor = Predictor(model, max(tokenizer.get_vocab().values()) + 1)
    likelihoods(predictor, sentences, mask=tokenizer.mask_token_id, precision=precision)
    seconds = time.perf_counter() - start
    return {"pairs": len(pairs), "seconds": seconds, "seconds_for_67000": seconds * 67000 / len(pairs)}


if __name__ == "__main__":
    main()
