"""The model card of a run's member: what it is, what taught it, on what text, and how well it does."""

from collections.abc import Mapping
from pathlib import PurePath
from typing import Any

from codistill.config import MemberConfig, Run

_KIND = {
    "mlm": ("masked", "fill-mask", "AutoModelForMaskedLM"),
    "clm": ("causal", "text-generation", "AutoModelForCausalLM"),
}


def model_card(run: Run, results: Mapping[str, Any], name: str) -> str:
    """A README.md in Markdown with the header that model hubs read, of the member `name` of a finished run.

    `run` as its run.yaml says it, provenance included; `results` as in its results.json. Says nothing of a licence,
    which is for whoever publishes the model to choose.
    """
    parts = [_header(run), _what(run, results, name), _teachers(run, name), _data(run, results)]
    parts += [_training(run, name), _results(run, results, name), _use(run)]
    return "\n\n".join(part for part in parts if part) + "\n"


def _header(run: Run) -> str:
    _, task, _ = _KIND[run.objective.name]
    return f"---\nlibrary_name: transformers\npipeline_tag: {task}\ntags:\n- codistill\n---"


def _what(run: Run, results: Mapping[str, Any], name: str) -> str:
    member, kind = run.members[name], _KIND[run.objective.name][0]
    millions = results["members"][name]["parameters"] / 1e6
    how = "a teacher, not trained in this run" if member.frozen else "trained"
    recipe = f"recipe `{run.recipe}`" if run.recipe else "a configuration of its own"
    version = ((run.provenance or {}).get("versions") or {}).get("codistill")
    tool = "codistill" + (f" {version}" if version else "")
    model = f"A {kind} language model of {millions:.2f} M parameters ({_shape(member)})"
    return f"# {name}\n\n{model}, {how} with {tool}, {recipe}."


def _shape(member: MemberConfig) -> str:
    if member.model is None:
        return f"from `{_place(member.path or '?')}`"
    start = f", begun from `{_place(member.init.from_)}`" if member.init else ""
    return f"{member.model.family}, {member.model.layers} layers × {member.model.width}{start}"


def _teachers(run: Run, name: str) -> str:
    edges = [edge for edge in run.distillation if edge.student == name]
    if not edges:
        return "" if run.members[name].frozen else "## Teachers\n\nNone: it learned from the text alone."
    rows = ["| teacher | divergence | weight | temperature |", "|---|---|---|---|"]
    for edge in edges:
        teacher = run.members[edge.teacher]
        state = "frozen" if teacher.frozen else "trained beside it"
        who = f"{edge.teacher} ({_shape(teacher)}; {state})"
        rows.append(f"| {who} | {edge.divergence} | {edge.weight} | {edge.temperature:g} |")
    return f"## Teachers\n\nHard weight {run.members[name].hard_weight}.\n\n" + "\n".join(rows)


def _data(run: Run, results: Mapping[str, Any]) -> str:
    facts = ((run.provenance or {}).get("data") or {}).get("train") or {}
    sources = ", ".join(f"`{_place(source)}`" for source in run.data.train)
    size = f", {facts['documents']:,} documents of {facts['tokens']:,} tokens" if facts else ""
    seen = f"{results['tokens']:,} tokens were seen"
    passes = f", {results['tokens'] / facts['tokens']:.2f} times the text" if facts else ""
    rows = f"rows of {run.data.length} tokens" + (", documents kept apart" if run.data.within_documents else "")
    return f"## Data\n\n{sources}{size}; tokenizer `{_place(run.data.tokenizer or 'its own')}`; {rows}. {seen}{passes}."


def _training(run: Run, name: str) -> str:
    member = run.members[name]
    if member.frozen:
        return ""
    return (
        f"## Training\n\n{run.steps:,} steps of {run.batch.sequences} rows; AdamW, learning rate {member.lr}, betas "
        f"{member.betas}, weight decay {member.weight_decay:g}, gradients clipped at {member.clip:g}; "
        f"{run.precision}; seed {run.seed}."
    )


def _results(run: Run, results: Mapping[str, Any], name: str) -> str:
    rows = ["| member | loss | perplexity | accuracy |", "|---|---|---|---|"]
    for member, score in results["members"].items():
        title = f"**{member}**" if member == name else member
        rows.append(f"| {title} | {score['loss']:.3f} | {score['perplexity']:.1f} | {score['accuracy']:.1%} |")
    unigram, count = results["held_out"]["unigram_loss"], results["held_out"]["rows"]
    what = "masked tokens" if run.objective.name == "mlm" else "next tokens"
    return (
        f"## Results\n\nHeld-out loss in nats over {count:,} {what} (one run; knowing how often each token occurs, and "
        f"nothing else, gives {unigram:.3f}):\n\n" + "\n".join(rows)
    )


def _use(run: Run) -> str:
    auto = _KIND[run.objective.name][2]
    return (
        f"## Use\n\n```python\nfrom transformers import AutoTokenizer, {auto}\n\n"
        f'model = {auto}.from_pretrained("FOLDER")\ntokenizer = AutoTokenizer.from_pretrained("FOLDER")\n```'
    )


def _place(path: str) -> str:
    """The end of an absolute path: whose machine it was is nobody's business."""
    place = PurePath(path)
    return "/".join(place.parts[-3:]) if place.is_absolute() else path
