"""The card of a member: what it is, who taught it, on what text, and what was measured. From the run folder only."""

import json
import re
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from codistill.config import KINDS, DistillationConfig, MemberConfig, Run
from codistill.loading import to_yaml


def model_card(run: Run, results: Mapping[str, Any], member: str) -> str:
    """Markdown, with the front matter that the hub reads, for `member` of a finished run.

    `run` as its run.yaml says it, provenance included; `results` as in its results.json. Says nothing of a licence,
    which is for whoever publishes the model to choose. Names of text sources are cut to their last part, of a glob to
    the last that has a name: where they lay on somebody's disk is nobody's business.
    """
    parts = [_front_matter(run), _what(run, results, member), _teaching(run, member), _data(run, results)]
    return "\n".join([*parts, _results(run, results, member), _use(run), _again(run)])


def _front_matter(run: Run) -> str:
    task = {"mlm": "fill-mask", "clm": "text-generation"}[run.objective.name]
    return f"---\nlibrary_name: transformers\npipeline_tag: {task}\ntags: [codistill, distillation]\n---\n"


def _what(run: Run, results: Mapping[str, Any], member: str) -> str:
    kind = KINDS[run.objective.name]
    came = (run.provenance or {}).get("versions", {}).get("codistill", "an unknown version")
    size = f"{results['members'][member]['parameters'] / 1e6:.2f} M parameters"
    made = (
        "taken as it was and not trained" if run.members[member].frozen else f"trained for {results['steps']:,} steps"
    )
    return (
        f"# {member}\n\nA {kind} language model of {size}{_shape(run.members[member])}, {made} with codistill ({came}) "
        f"as the member `{member}` of a run of `{run.recipe or 'a configuration of its own'}`.\n"
    )


def _shape(member: MemberConfig) -> str:
    if member.model is None:
        return f", begun as `{_last_part(member.path)}`"
    begun = f", initialised from `{_last_part(member.init.from_)}`" if member.init else ", initialised at random"
    return f" ({member.model.family}, {member.model.layers} layers × {member.model.width}){begun}"


def _teaching(run: Run, member: str) -> str:
    edges = [edge for edge in run.distillation if edge.student == member]
    if not edges:
        return "## Teachers\n\nNone.\n"
    head = "| teacher | divergence | temperature | weight |\n|---|---|---|---|"
    return "\n".join(["## Teachers\n", head, *(_edge(run, edge) for edge in edges), ""])


def _edge(run: Run, edge: DistillationConfig) -> str:
    teacher = run.members[edge.teacher]
    learns = "frozen" if teacher.frozen else "trained beside it"
    weight = edge.weight if isinstance(edge.weight, int | float) else f"`{json.dumps(edge.weight)}`"
    what = {"hidden": "hidden states", "relation": "attention relations"}.get(edge.kind, _last_part(edge.divergence))
    return f"| `{edge.teacher}`{_shape(teacher)}; {learns} | {what} | {edge.temperature} | {weight} |"


def _data(run: Run, results: Mapping[str, Any]) -> str:
    facts = (run.provenance or {}).get("data", {})
    lines = ["## Data\n"]
    for split, sources in (("train", run.data.train), ("validation", run.data.validation)):
        of = facts.get(split)
        size = f": {of['documents']:,} documents, {of['tokens']:,} tokens (content {of['identity'][:16]})" if of else ""
        lines.append(f"- {split}: {', '.join(f'`{_last_part(source)}`' for source in sources)}{size}")
    batch = f"{run.batch.sequences} × {run.data.length} tokens"
    seen = f"{results['tokens']:,} tokens in {results['steps']:,} steps of {batch}"
    skipped = f"; {results['skipped']:,} of the steps were skipped: a loss or gradient was not finite"
    passes = f", {results['passes']:.3g} passes over the text" if "passes" in results else ""
    lines.append(f"- seen in training: {seen}{passes}{skipped if results.get('skipped') else ''}")
    for part in (run.provenance or {}).get("changed", []):
        before = {**part["was"], **part.get("inputs", {})}
        settings = ", ".join(f"`{key}` (was {was})" for key, was in before.items())
        lines.append(f"- **changed on the way**, before step {part['from_step'] + 1}: {settings}")
    return "\n".join([*lines, ""])


def _results(run: Run, results: Mapping[str, Any], member: str) -> str:
    own, held_out, seed = results["members"][member], results["held_out"], results["seed"]
    perplexity = "too large" if own["perplexity"] is None else f"{own['perplexity']:.2f}"
    rows = [("loss (nats)", _loss(own)), ("perplexity", "no number" if own["loss"] is None else perplexity)]
    rows += [("accuracy (top 1)", f"{own['accuracy']:.2%}")]
    rows += [("unigram cross-entropy of the same tokens", f"{held_out['unigram_loss']:.4f}")]
    rows += [
        (f"loss of `{name}`, the same model, {_by(other)}", _loss(other))
        for name, other in results["members"].items()
        if member in (other["twin_of"],) or name == own["twin_of"]
    ]
    table = "\n".join(f"| {what} | {value} |" for what, value in rows)
    return (
        f"## Results\n\nOn {held_out['rows']:,} predicted tokens of the validation text. One run, seed {seed}, "
        f"so without an error bar; products in {results['precision']}.\n\n| measure | value |\n|---|---|\n{table}\n\n"
        "Nothing else was measured: no downstream task, no bias and no safety evaluation.\n"
    )


def _loss(member: Mapping[str, Any]) -> str:
    return "no number" if member["loss"] is None else f"{member['loss']:.4f}"


def _by(member: Mapping[str, Any]) -> str:
    return f"taught by {' and '.join(member['taught_by'])}" if member["taught_by"] else "taught by nobody"


def _use(run: Run) -> str:
    auto = {"mlm": "AutoModelForMaskedLM", "clm": "AutoModelForCausalLM"}[run.objective.name]
    example = (
        '\nprompt = tokenizer("The old king", return_tensors="pt")\n'
        "made = model.generate(**prompt, max_new_tokens=40, do_sample=False)\n"
        "print(tokenizer.decode(made[0], skip_special_tokens=True))\n"
    )
    return (
        f"## Use\n\n```python\nfrom transformers import AutoTokenizer, {auto}\n\n"
        f'model = {auto}.from_pretrained("FOLDER")\ntokenizer = AutoTokenizer.from_pretrained("FOLDER")\n'
        f"{example if run.objective.name == 'clm' else ''}```\n"
    )


def _again(run: Run) -> str:
    tokenizer = _last_part(run.data.tokenizer) if run.data.tokenizer else None
    train, validation = (
        [_last_part(source) for source in sources] for sources in (run.data.train, run.data.validation)
    )
    data = replace(run.data, train=train, validation=validation, tokenizer=tokenizer)
    members = {name: _without_place(member) for name, member in run.members.items()}
    edges = [replace(edge, divergence=_last_part(edge.divergence)) for edge in run.distillation]
    plain = to_yaml(replace(run, provenance=None, data=data, members=members, distillation=edges))
    return (
        "## The whole recipe\n\nFor `codistill train`, once text and models are named where they lie.\n\n"
        f"```yaml\n{plain}```\n"
    )


def _without_place(member: MemberConfig) -> MemberConfig:
    init = replace(member.init, from_=_last_part(member.init.from_)) if member.init else None
    return replace(member, path=_last_part(member.path) if member.path else None, init=init)


def _last_part(place: str | None) -> str:
    """The end of a path or glob, from the last part on that has a name: of /home/me/corpus/*.txt it is corpus/*.txt.
    Built-in text, which lies on nobody's disk, keeps its whole name."""
    if place and place.startswith("builtin:"):
        return place
    parts = [part for part in (place or "").split("/") if part]
    named = [at for at, part in enumerate(parts) if _has_name(part)]
    return "/".join(parts[named[-1] if named else 0 :])


def _has_name(part: str) -> bool:
    """Whether a part of a path says more than which kind of files are meant, as `*.txt` and `**` do."""
    literal = re.sub(r"\[[^]]*\]|[*?]", "", part)
    return literal == part or bool(re.match(r"\w", literal))
