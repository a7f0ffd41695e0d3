"""What a run will take, before it starts: tokens, floating-point operations, memory, and time on this machine."""

import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from rich.box import SIMPLE
from rich.table import Table
from transformers import PreTrainedModel

from codistill.build import adamw, edges_of, resolved_precision
from codistill.cohort import Cohort
from codistill.config import Run
from codistill.costs import forward_cost, member_flops
from codistill.data.corpus import read_manifest
from codistill.data.tokenizers import load_tokenizer, parse_training_spec, vocabulary_size
from codistill.initial import new_member
from codistill.kernels.chunked import buffer_bytes, rows_per_chunk
from codistill.kernels.rows import scratch_bytes
from codistill.member import Member
from codistill.models import Predictor, load_model
from codistill.objectives import Batch
from codistill.provenance import own_divergences
from codistill.texts import tokenizer_spec

_STEPS_TRIED = 3
_MOST_FLOPS_TRIED = {"cpu": 2e12, "cuda": 2e15}  # of a step: above, trying some would itself take minutes


@dataclass(frozen=True)
class Plan:
    """`flops` as in `costs.member_flops`. `memory`: bytes of each part. `seconds`: of the whole run, from
    steps tried here on made-up tokens, without held-out scores; None where they were not tried, and `why_not`.
    `accumulates`: several micro-batches a step. `passes`: how often the text is seen, None where its
    length is not known.
    """

    tokens: int
    parameters: dict[str, int]
    flops: dict[str, dict[str, int]]
    memory: dict[str, int]
    seconds: float | None
    why_not: str = ""
    accumulates: bool = False
    passes: float | None = None

    @property
    def peak_bytes(self) -> int:
        """The most that is in use at once."""
        return most_at_once(self.memory, accumulates=self.accumulates)


def plan(run: Run, device: torch.device) -> Plan:
    """The plan of `run` on one `device`. Prepares no text; UserError where a pre-trained member cannot be read."""
    vocabulary = _vocabulary(run)
    precision = resolved_precision(run, device)
    models = {name: model_of(run, name, vocabulary) for name in run.members}
    rows = run.rows_per_step
    flops = member_flops(run, models, rows=rows, steps=range(run.steps))
    memory = memory_of(run, models, vocabulary, getattr(torch, precision), device.type)
    a_step = sum(of["own"] for of in flops.values()) / run.steps
    tokens = run.steps * run.batch.sequences * run.data.length
    parameters = {name: Predictor(model, vocabulary).num_parameters for name, model in models.items()}
    found = Plan(tokens, parameters, flops, memory, None, "", run.batch.accumulate > 1, _passes(run, tokens))
    why = why_not_try(memory, found.peak_bytes, a_step, device)
    if why:
        return replace(found, why_not=why)
    seconds = seconds_a_step(run, models, vocabulary, device, getattr(torch, precision))
    return replace(found, seconds=seconds * run.steps)


def _passes(run: Run, tokens: int) -> float | None:
    """How often `run` sees its text, if `data.tokens` or a prepared folder says how long that is."""
    unique, sources = run.data.tokens, run.data.train
    if len(sources) == 1 and (Path(sources[0]) / "manifest.json").is_file():
        manifest = read_manifest(Path(sources[0]))
        # What a run counts are positions: of padded rows, which hold a unit each, those of the padding too.
        whole = manifest["units"] * run.data.length if run.data.packing == "padded" else manifest["tokens"]
        unique = min(unique or whole, whole)
    return tokens / unique if unique else None


def plan_table(found: Plan, run: Run) -> Table:
    """The plan for people."""
    table = Table(box=SIMPLE, title=f"{run.steps:,} steps, {found.tokens:,} tokens", caption=_caption(found))
    for heading in ("member", "parameters", "FLOPs", "of its frozen teachers"):
        table.add_column(heading, justify="left" if heading == "member" else "right")
    for name, of in found.flops.items():
        taught = f"{of['teachers']:.3g}" if of["teachers"] else ""
        table.add_row(name, f"{found.parameters[name] / 1e6:.2f} M", f"{of['own']:.3g}", taught)
    return table


def memory_lines(found: Plan) -> list[str]:
    """What needs how much memory, and what is in use at most."""
    lines = [f"{name}: {size / 2**20:,.0f} MiB" for name, size in found.memory.items()]
    most = f"at most in use at once by tensors: {found.peak_bytes / 2**20:,.0f} MiB"
    return [*lines, most, "the process takes more: libraries, and what its allocator keeps"]


def memory_of(
    run: Run, models: dict[str, PreTrainedModel], vocabulary: int, precision: torch.dtype, device: str
) -> dict[str, int]:
    """Bytes of each part of a step. Activations are those of one micro-batch, all of them kept: with
    `gradient_checkpointing` there are fewer."""
    rows = run.rows_per_step // run.batch.accumulate
    shape = {"sequences": run.batch.sequences // run.batch.accumulate, "length": run.data.length, "rows": rows}
    costs = {
        name: forward_cost(model, vocabulary=vocabulary, precision=precision, device=device, **shape)
        for name, model in models.items()
    }
    trained = run.trained
    softmaxes = {(name, 1.0) for name in models}
    softmaxes |= {(name, e.temperature) for e in run.distillation for name in (e.teacher, e.student)}
    chunk = min(rows, rows_per_chunk(vocabulary, device))
    loss = buffer_bytes(rows, vocabulary, len(models), device)
    # Elsewhere Triton's kernels need none, and they know no squared error.
    if device == "cpu" or any(edge.divergence == "squared_error" for edge in run.distillation):
        held = (0, len(trained), 0) if run.compile else (len(softmaxes), len(trained), len(run.distillation))
        loss += scratch_bytes(chunk, vocabulary, *held, device)
    loss += sum(rows * costs[name].width * precision.itemsize for name in trained)  # the features' gradients
    if precision != torch.float32 and device != "cpu":  # where the products take a copy of the output embedding
        loss += sum(vocabulary * cost.width * precision.itemsize for cost in costs.values())
    return {
        "parameters": 4 * sum(cost.parameters for cost in costs.values()),
        "gradients": 4 * sum(costs[name].parameters for name in trained),
        "optimizer states": 8 * sum(costs[name].parameters for name in trained),
        "activations": sum(costs[name].saved_bytes for name in trained),
        "gradients of output layers": 4 * sum(vocabulary * costs[name].width for name in trained),
        "the loss's buffers" + (", without own divergences" if own_divergences(run) else ""): loss,
    }


def most_at_once(memory: Mapping[str, int], *, accumulates: bool = False) -> int:
    """Bytes in use at once, at most, of the parts that `memory_of` gives: the larger of the moment after the loss and
    the end of the backward pass."""
    steady = memory["parameters"] + memory["optimizer states"]
    after_loss = memory["activations"] + memory["the loss's buffers"] + memory["gradients of output layers"]
    kept = memory["gradients"] if accumulates else 0  # of the micro-batches before
    return steady + max(after_loss + kept, memory["gradients"])


def seconds_a_step(
    run: Run, models: dict[str, PreTrainedModel], vocabulary: int, device: torch.device, precision: torch.dtype
) -> float:
    """The least of a few steps' times on made-up tokens, with all members and edges, not compiled."""
    cohort = made_up_cohort(run, models, vocabulary, device, precision)
    batches = [made_up_batch(run, vocabulary).to(device) for _ in range(run.batch.accumulate)]
    seconds = []
    for step in range(_STEPS_TRIED):
        start = time.perf_counter()
        cohort.step(step, batches)
        if device.type == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    return min(seconds)


def made_up_cohort(
    run: Run, models: dict[str, PreTrainedModel], vocabulary: int, device: torch.device, precision: torch.dtype
) -> Cohort:
    """A cohort of `models` on `device`, those on the meta device with random numbers; its learning rates are 0."""
    members = []
    for name, model in models.items():
        predictor = Predictor(_materialised(model, device), vocabulary)
        optimizer = None if run.members[name].frozen else adamw(predictor, 0.0, (0.9, 0.999), 1e-8)
        members.append(Member(name, predictor, optimizer, lr=0.0))
    return Cohort(members, edges_of(run), precision=precision)


def _materialised(model: PreTrainedModel, device: torch.device) -> PreTrainedModel:
    """The model with numbers: what is on the meta device is made anew."""
    if not any(parameter.is_meta for parameter in model.parameters()):
        return model.to(device)  # type: ignore[arg-type]
    with device:
        return type(model)(model.config)


def made_up_batch(run: Run, vocabulary: int) -> Batch:
    """Made-up tokens; predicted are as many rows as a run's micro-batch has."""
    count = run.batch.sequences // run.batch.accumulate
    ids_BT = torch.randint(vocabulary, (count, run.data.length))
    each = run.rows_per_step // run.batch.sequences
    rows_N = torch.arange(count).repeat_interleave(each) * run.data.length + torch.arange(each).repeat(count)
    return Batch({"input_ids": ids_BT}, rows_N, torch.randint(vocabulary, (len(rows_N),)))


def _vocabulary(run: Run) -> int:
    """How many tokens the run tells apart."""
    spec = tokenizer_spec(run)
    return parse_training_spec(spec)[1] if spec.startswith("train:") else vocabulary_size(load_tokenizer(spec))


def model_of(run: Run, name: str, vocabulary: int) -> PreTrainedModel:
    """The member `name` of `run`: as it is stored, or on the meta device one that is yet to be made."""
    member = run.members[name]
    if member.model is None:
        field = f"members.{name}.path"
        return load_model(
            str(member.path), field, objective=run.objective.name, trust_remote_code=member.trust_remote_code
        )
    with torch.device("meta"):
        return new_member(run, name, vocabulary, None)


def why_not_try(memory: Mapping[str, int], needed: int, flops_a_step: float, device: torch.device) -> str:
    """Why some steps that need so many bytes (`memory`: of what) and operations should not be tried on `device`, and
    what to lower; "" if they may."""
    if flops_a_step > _MOST_FLOPS_TRIED.get(device.type, 0):
        return f"time not estimated: a step of {flops_a_step:.2g} FLOPs is too large to try here"
    free = _free_bytes(device)
    if needed <= free:
        return ""
    return f"needs {needed / 2**30:.1f} GiB, and {free / 2**30:.1f} GiB are free{_largest(memory)}"


def _largest(memory: Mapping[str, int]) -> str:
    """What to lower, by what needs the most."""
    name = max(memory, key=lambda part: memory[part])
    return f"; the most goes to {name}: " + (
        "lower batch.sequences or raise batch.accumulate" if name == "activations" else "take smaller members"
    )


def _free_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    try:
        with open("/proc/meminfo", encoding="utf-8") as lines:
            return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable"))
    except (OSError, StopIteration):
        return 1 << 62


def _caption(found: Plan) -> str:
    total = sum(of["own"] for of in found.flops.values())
    when = found.why_not if found.seconds is None else f"about {duration(found.seconds)} on this machine"
    return f"{total:.3g} FLOPs in all; {when}"


def duration(seconds: float) -> str:
    """For people: seconds, minutes or hours."""
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"
