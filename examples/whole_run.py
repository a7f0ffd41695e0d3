"""A whole run from Python, as `codistill train FILE.yaml` would do it: data, checkpoints, scores, models."""

from pathlib import Path

from codistill import load_run, train

Path("text.txt").write_text("the cat sat on the mat and saw a dog run far. " * 400)
size = {"width": 32, "heads": 2}
run = load_run(
    {
        "data": {"train": ["text.txt"], "validation": ["text.txt"], "tokenizer": "train:wordpiece:80", "length": 32},
        "members": {"large": {"model": {"layers": 2} | size}, "small": {"model": {"layers": 1} | size}},
        "distillation": [{"teacher": "large", "student": "small"}, {"teacher": "small", "student": "large"}],
        "batch": {"sequences": 8},
        "steps": 10,
    }
)
out = train(run, Path("run"))
print(sorted(path.name for path in out.iterdir()))
