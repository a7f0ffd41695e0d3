"""bench loss, data, step, latency: measurements side by side."""

from pathlib import Path
from typing import Annotated, Literal

from cyclopts import Parameter

from codistill.cli.console import Settings, Source, bench, console, resolve

# As `codistill.bench` has them, which imports torch, and help does not.
LOSS_PROVIDERS = (
    *(
        "bare products",
        "ours, chunked",
        "ours, triton",
        "ours, reference",
        "plain",
        "plain, compiled",
        "plain, all rows",
    ),
    *("liger chunked", "liger chunked, 4096", "liger chunked, eager", "liger triton", "flash-linear-attention"),
    *("torch, hard only", "torch, hard only, 512", "cut-cross-entropy, hard only", "quack, hard only"),
)
STEP_PROVIDERS = (
    *("ours", "ours, compiled", "ours, one by one", "plain", "plain, all rows", "plain, compiled"),
    *("plain, Liger's loss", "textbrewer", "modelopt", "pytorch-dml"),
)


def _only(names: tuple[str, ...]) -> Parameter:
    quoted = ", ".join(f'"{name}"' for name in names)  # because commas stand in names too
    return Parameter(negative="", help=f"Only this provider; may be repeated: {quoted}.")


Rows = Annotated[int, Parameter(help="Predicted rows.")]


@bench.command(name="loss")
def bench_loss(
    *,
    device: Annotated[str, Parameter(help="cpu or cuda.")] = "cpu",
    dtype: Annotated[Literal["float32", "bfloat16"], Parameter(help="Precision of the matrix products.")] = "float32",
    rows: Rows = 2048,
    vocabulary: Annotated[int, Parameter(help="Vocabulary size.")] = 30522,
    width: Annotated[int, Parameter(help="Width of both members.")] = 768,
    runs: Annotated[int, Parameter(help="Timed runs of each provider, taken in turns.")] = 7,
    provider: Annotated[list[str] | None, _only(LOSS_PROVIDERS)] = None,
    out: Annotated[Path | None, Parameter(help="A JSON file for the results.")] = None,
) -> None:
    """The vocabulary loss: speed, peak memory and gradient error against float64.

    Example: codistill bench loss --rows 2048 --vocabulary 30522 --out loss.json
    """
    from codistill.bench import bench_loss as measure

    measure(
        device=device,
        dtype=dtype,
        rows=rows,
        vocabulary=vocabulary,
        width=width,
        runs=runs,
        providers=provider,
        out=out,
    )


@bench.command(name="data")
def bench_data(
    sources: Annotated[list[str] | None, Parameter(help="Text, by default the built-in.")] = None,
    /,
    *,
    tokenizer: Annotated[str, Parameter(help="As for `prepare`.")] = "train:wordpiece:4096",
    length: Annotated[int, Parameter(help="Tokens in a row.")] = 128,
    mask_rate: Annotated[float, Parameter(help="Share of a row that is predicted.")] = 0.3,
    out: Annotated[Path | None, Parameter(help="A JSON file for the results.")] = None,
) -> None:
    """Text to tokens beside the bare tokenizers library, and tokens to batches.

    Example: codistill bench data corpus/ --tokenizer vocab.txt
    """
    from codistill.bench import bench_data as measure
    from codistill.bench.measure import write_result

    rows = measure(sources or ["builtin:python"], tokenizer, length=length, mask_rate=mask_rate)
    for row in rows:
        ratio = f"{row['ratio']:.2f} × the bare library" if row.get("ratio") else ""
        console.print(f"{row['what']:<40} {row['cores']} core(s) {row['tokens_per_second']:>12,.0f} tokens/s  {ratio}")
    write_result(out, rows)


@bench.command(name="step")
def bench_step(
    source: Source = "ctcd:tiny",
    /,
    *,
    set_: Settings = None,
    device: Annotated[str, Parameter(help="cpu or cuda.")] = "cpu",
    runs: Annotated[int, Parameter(help="Timed steps of each provider, taken in turns.")] = 7,
    provider: Annotated[list[str] | None, _only(STEP_PROVIDERS)] = None,
    out: Annotated[Path | None, Parameter(help="A JSON file for the results.")] = None,
) -> None:
    """A whole training step: tokens a second, utilisation, peak memory, and where the time goes.

    Example: codistill bench step ctcd:tiny --runs 5 --out step.json
    """
    from codistill.bench import bench_step as measure

    measure(resolve(source, set_ or []), device=device, runs=runs, providers=provider, out=out)


@bench.command(name="latency")
def bench_latency(
    models: Annotated[list[Path], Parameter(help="Model folders, exported ones, or run folders (all their members).")],
    /,
    *,
    length: Annotated[
        list[int] | None, Parameter(negative="", help="Sequence length; may be repeated [128 and 512].")
    ] = None,
    batch: Annotated[int, Parameter(help="Sequences at a time, for the throughput.")] = 16,
    runs: Annotated[int, Parameter(help="Timed runs of each model, taken in turns.")] = 30,
    device: Annotated[str, Parameter(help="cpu or cuda; ONNX runs on the CPU.")] = "cpu",
    out: Annotated[Path | None, Parameter(help="A JSON file for the results.")] = None,
) -> None:
    """How fast models answer: latency of one sequence, throughput of many, beside their held-out loss.

    Example: codistill bench latency runs/ctcd-tiny exported/small-int8 --length 128
    """
    from codistill.bench import bench_latency as measure

    measure(models, lengths=length or (128, 512), batch=batch, runs=runs, device=device, out=out)
