"""The table of `docs/remap.md`, measured. `python tests/test_remap_table.py` writes it into the page."""

import sys
from pathlib import Path

import pytest

if __name__ == "__main__":
    sys.path[:0] = [str(Path(__file__).parents[1] / "src"), str(Path(__file__).parent)]

from codistill.remap import remap_state
from remap_models import FAMILIES, build, config_of, drawn, logits, one_thread  # noqa: F401

PAGE = Path(__file__).parents[1] / "docs" / "remap.md"
SOURCE = {"layers": 2, "width": 32, "heads": 4, "ffn": 48}
# What it says in the table, what changes in the source and the target, the methods, and whether norms are as at first.
ROWS = [
    ("`replicate`, width × 2, more heads", {}, {"width": 64, "heads": 8, "ffn": 96}, {"width": "replicate"}),
    ("`replicate`, width × 2, wider heads", {}, {"width": 64, "ffn": 96}, {"width": "replicate"}),
    ("`replicate`, width × 1½", {}, {"width": 48, "heads": 6}, {"width": "replicate"}),
    ("`replicate`, FFN × 1½ only", {}, {"ffn": 72}, {"width": "replicate"}),
    ("`tile`, width × 2", {}, {"width": 64, "heads": 8, "ffn": 96}, {"width": "tile"}),
    ("`zero`, width × 2", {}, {"width": 64, "heads": 8, "ffn": 96}, {"width": "zero"}),
    ("`zero`, width × 2, norms as initialised", {}, {"width": 64, "heads": 8, "ffn": 96}, {"width": "zero"}),
    ("`zero`, width × 1½", {}, {"width": 48, "heads": 6}, {"width": "zero"}),
    ("`zero`, FFN × 1½ only", {}, {"ffn": 72}, {"width": "zero"}),
    ("`advanced`, width × 2", {}, {"width": 64, "heads": 8, "ffn": 96}, {"width": "advanced"}),
    ("`identity`, 2 → 4 layers", {}, {"layers": 4}, {"depth": "identity"}),
    ("`repeat-last`, 2 → 4", {}, {"layers": 4}, {"depth": "repeat-last"}),
    ("`stack`, 2 → 4", {}, {"layers": 4}, {"depth": "stack"}),
    ("`interpolate`, 2 → 4", {}, {"layers": 4}, {"depth": "interpolate"}),
    ("`first`, 4 → 2", {"layers": 4}, {}, {"depth": "first"}),
    ("`uniform`, 4 → 2", {"layers": 4}, {}, {"depth": "uniform"}),
    ("`last`, 4 → 2", {"layers": 4}, {}, {"depth": "last"}),
    ("`select`, width ÷ 2", {}, {"width": 16, "ffn": 24}, {"width": "select"}),
    ("`select-first`, width ÷ 2", {}, {"width": 16, "heads": 2, "ffn": 24}, {"width": "select-first"}),
]


def measured(family, row):
    """The root mean square difference of the logits in standard deviations, or `exact` if none is over 1e-11."""
    label, before, after, methods = row
    config, target = config_of(family, **SOURCE | before), config_of(family, **SOURCE | after)
    model = drawn(config, initial_norms="as initialised" in label)
    expected = logits(model)
    difference = logits(build(target, remap_state(model.state_dict(), config, target, **methods))) - expected
    if difference.abs().max() < 1e-11 * expected.std():
        return "exact"
    return f"{(difference.pow(2).mean().sqrt() / expected.std()).item():.2g}"


def table():
    titles = ["", *("BERT", "RoBERTa", "DistilBERT", "ModernBERT", "Llama", "GPT-2")]
    lines = [titles, ["---"] * len(titles), *([row[0], *(measured(f, row) for f in FAMILIES)] for row in ROWS)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def test_the_page_says_what_is_measured():
    if not PAGE.exists():
        pytest.skip("docs/remap.md is not beside the tests")
    assert table() in PAGE.read_text(encoding="utf-8")


if __name__ == "__main__":
    before, _, rest = PAGE.read_text(encoding="utf-8").partition("<!-- table -->\n")
    after = rest.partition("<!-- end -->")[2]
    PAGE.write_text(f"{before}<!-- table -->\n{table()}\n<!-- end -->{after}", encoding="utf-8")
