"""Whole runs: exact resumption in a new process, folders, failures. Small models on the built-in text."""

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForMaskedLM, AutoTokenizer

from codistill import checkpoint
from codistill.blocks import to_markdown
from codistill.build import adamw, build, edges_of
from codistill.cli import main
from codistill.cohort import Cohort
from codistill.config import Checkpointing, DistillationConfig, Layers, Run
from codistill.distributed import Ranks
from codistill.edges import Distillation
from codistill.errors import MachineError
from codistill.files import locked
from codistill.loading import load, override, read_run, to_dict, to_yaml
from codistill.recipes import RECIPES, find
from codistill.report.sections import section
from codistill.study.worker import work
from codistill.train import Stopped, train
from codistill.watch import NonFiniteError
from runs import assert_same_run, refused, small_run, weights, with_teachers

CPU = torch.device("cpu")


def in_new_process(statement: str) -> None:
    code = f"""
from pathlib import Path
from codistill.loading import load, read_run
from codistill.train import Stopped, train
def go(run, out, stop_at):
    try:
        train(run, Path(out), resume=True, stop_at=stop_at)
    except Stopped:
        assert stop_at
{statement}"""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    # DeBERTa's file before transformers 5.23 warns as it is imported.
    warnings = ["-W", "error", "-W", "ignore:`torch.jit.script:DeprecationWarning"]
    subprocess.run([sys.executable, *warnings, "-c", code], check=True, env=environment, timeout=120)


def last_step_of_the_first_epoch(run) -> int:
    rows = build(replace(run, precision="float32"), CPU).batches.num_rows
    assert rows // run.batch.sequences + 1 < run.steps, "the run must go beyond one epoch"
    return rows // run.batch.sequences


@pytest.mark.parametrize("recipe", ["standalone", "dwt", "ctcd", "community", "dwt-clm"])
def test_a_resumed_run_is_the_straight_run_bit_for_bit(recipe, text, teacher, causal_teacher, tmp_path):
    """In new processes, stopped in mid-epoch, in the batch where an epoch ends, and just after it."""
    apart = ["data.within_documents=true"] if recipe.endswith("-clm") else []
    run = with_teachers(recipe, text, causal_teacher if apart else teacher, *apart)
    straight = train(run, tmp_path / "straight")
    end = last_step_of_the_first_epoch(run)
    with pytest.raises(Stopped):
        train(run, tmp_path / "resumed", stop_at=7)
    assert not (tmp_path / "resumed" / "results.json").exists()
    resumed = f"load(read_run(Path({str(tmp_path / 'resumed' / 'run.yaml')!r})))"
    again = f"go({resumed}, {str(tmp_path / 'resumed')!r}, {{}})"
    in_new_process("; ".join(again.format(stop) for stop in (end, end + 1, None)))
    assert_same_run(straight, tmp_path / "resumed")


def test_the_resolved_configuration_repeats_the_run(text, tmp_path):
    first = train(small_run("ctcd", text), tmp_path / "first")
    again = train(load(read_run(first / "run.yaml")), tmp_path / "again")
    assert_same_run(first, again)


def test_a_deterministic_run_asks_for_it_before_there_is_a_device(text, tmp_path, monkeypatch):
    """cuBLAS reads its setting once, when a GPU is first used; what somebody else has set stays."""
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    found = []

    def start(*_):
        found.append((os.environ.get("CUBLAS_WORKSPACE_CONFIG"), torch.are_deterministic_algorithms_enabled()))
        return Ranks()

    monkeypatch.setattr("codistill.distributed.start", start)
    run = small_run("standalone:tiny", text, "steps=2", "deterministic=true")
    try:
        train(run, tmp_path / "one")
        monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":16:8")
        train(run, tmp_path / "two")
    finally:
        torch.use_deterministic_algorithms(False)
    assert found == [(":4096:8", True), (":16:8", True)]
    assert_same_run(tmp_path / "one", tmp_path / "two")


def test_a_runs_steps_are_0_1_2_and_have_the_batches_of_these(text, tmp_path, monkeypatch):
    seen, plain = [], Cohort.step
    keep = lambda self, step, batches: seen.append((step, batches)) or plain(self, step, batches)  # noqa: E731
    monkeypatch.setattr(Cohort, "step", keep)
    run = small_run("standalone", text, "steps=3")
    with pytest.raises(Stopped):
        train(run, tmp_path / "run", stop_at=2)
    train(run, tmp_path / "run", resume=True)
    assert [step for step, _ in seen] == [0, 1, 2]
    batches = build(replace(run, precision="float32"), CPU).batches
    for step, given in seen:
        for one, other in zip(given, batches.at(step), strict=True):
            assert torch.equal(one.inputs["input_ids"], other.inputs["input_ids"])


def test_a_seed_changes_the_run(text, tmp_path):
    first = train(small_run("standalone", text, "steps=2"), tmp_path / "first")
    other = train(small_run("standalone", text, "steps=2", "seed=1"), tmp_path / "other")
    with pytest.raises(AssertionError):
        assert_same_run(first, other)


def test_an_edge_of_the_cohort_has_the_settings_of_the_runs():
    between = {"teacher": "large", "student": "small"}
    layers, ramp = Layers(student=[1], teacher=[2]), {"linear": [4, 2]}
    run = Run(
        steps=10,
        distillation=[
            DistillationConfig(**between, divergence="reverse_kl", temperature=3.0, weight=ramp),
            DistillationConfig(**between, kind="hidden", layers=layers, weight=0.5),
            DistillationConfig(**between, kind="relation", relation_heads=6),
        ],
    )
    edges = edges_of(run)
    assert [[edge.weight_at(step) for step in (0, 5, 10)] for edge in edges] == [[4, 3, 2], [0.5] * 3, [1] * 3]
    assert [replace(edge, weight=1.0) for edge in edges] == [
        Distillation("large", "small", "reverse_kl", temperature=3.0),
        Distillation("large", "small", kind="hidden", layers=layers),
        Distillation("large", "small", kind="relation", relation_heads=6),
    ]


def test_a_member_of_the_cohort_has_the_settings_of_the_runs(text):
    large = "hard_weight: {linear: [0, 1]}, clip: 0.25, betas: [0.8, 0.95], eps: 1e-5, weight_decay: 0.2, lr: 0.125"
    small = "hard_weight: 0.5, clip: 4.0, betas: [0.7, 0.9], eps: 1e-6, weight_decay: 0.3, lr: {linear: [1, 0]}"
    model = "model: {family: modernbert, layers: 1, width: 32}"
    run = small_run("ctcd", text, "steps=4", "precision=float32")
    run = load(override(to_dict(run), [f"members={{large: {{{model}, {large}}}, small: {{{model}, {small}}}}}"]))
    members = build(run, CPU).cohort.members
    assert [member.clip for member in members.values()] == [0.25, 4.0]
    assert [member.hard_weight(3) for member in members.values()] == [0.75, 0.5]
    assert [member.lr(3) for member in members.values()] == [0.125, 0.25]
    for member, betas, eps, decay in zip(
        members.values(), [(0.8, 0.95), (0.7, 0.9)], [1e-5, 1e-6], [0.2, 0.3], strict=True
    ):
        groups = member.optimizer.param_groups
        assert [(group["betas"], group["eps"]) for group in groups] == [(betas, eps)] * 2
        decays = {p.ndim: group["weight_decay"] for group in groups for p in group["params"]}
        assert decays == {2: decay, 1: 0.0}


def test_adamw_decays_matrices_and_neither_norms_nor_biases():
    """Two steps of Loshchilov & Hutter's Algorithm 2, by hand, from 2 with the gradients 1 and 3."""
    layer = torch.nn.Linear(1, 1).double()
    optimizer = adamw(layer, 0.5, [0.5, 0.75], eps=1.0)
    for group in optimizer.param_groups:
        group["lr"] = 0.1
    for parameter in layer.parameters():
        torch.nn.init.constant_(parameter, 2.0)
    for gradient in (1.0, 3.0):
        for parameter in layer.parameters():
            parameter.grad = torch.full_like(parameter, gradient)
        optimizer.step()
    first = 0.1 * 1 / (1 + 1)
    momentum, square = (0.25 * 1 + 0.5 * 3) / 0.75, (0.1875 * 1 + 0.25 * 9) / 0.4375
    second = 0.1 * momentum / (square**0.5 + 1)
    assert layer.bias.item() == pytest.approx(2 - first - second)
    assert layer.weight.item() == pytest.approx((2 * 0.95 - first) * 0.95 - second)


def test_quickstarts_twin_is_the_stand_alone_run(text, tmp_path):
    alone = weights(train(small_run("standalone", text), tmp_path / "alone"))
    beside = weights(train(small_run("quickstart", text), tmp_path / "beside"))
    for name, tensor in alone.items():
        torch.testing.assert_close(tensor, beside[name.replace("large/", "large-alone/")], rtol=0, atol=0)
    assert any(not torch.equal(tensor, beside[name]) for name, tensor in alone.items())


@pytest.mark.parametrize("name", sorted(RECIPES))
def test_every_recipe_steps_at_tiny(name, text, teacher, causal_teacher):
    teacher = causal_teacher if name.endswith("-clm") else teacher
    tree = to_dict(find(f"{name}:tiny"))
    sets = ["batch.sequences=4", "evaluate.sequences=8", f"data.train=[{text}]", f"data.validation=[{text}]"]
    sets += [f"members.{n}.path={teacher}" for n, m in tree["members"].items() if "path" in m]
    # A teacher of this test is narrower than the recipe's, but shares its vocabulary with the students.
    sets.append("data.tokenizer=null" if any("path" in m for m in tree["members"].values()) else "data.length=64")
    run = replace(load(override(tree, sets)), precision="float32")
    built = build(run, CPU)
    for step in range(2):
        metrics = built.cohort.step(step, built.batches.at(step))
    assert built.cohort.failure() is None
    assert {f"{e.student}/from_{e.teacher}" for e in run.distillation} <= metrics.keys()
    assert all(torch.isfinite(value) for value in metrics.values())


@pytest.mark.parametrize("family", ["bert", "modernbert", "gpt2", "llama", "gemma3_text"])
def test_final_members_load_with_transformers_and_give_the_same_logits(family, text, tmp_path):
    masked = "bert" in family
    recipe = "standalone" if masked else "standalone-clm"
    run = small_run(recipe, text, "steps=2", f"members.large.model.family={family}")
    out = train(run, tmp_path / "run") / "members" / "large"
    auto = AutoModelForMaskedLM if masked else AutoModelForCausalLM
    model, report = auto.from_pretrained(out, output_loading_info=True)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    tokenizer = AutoTokenizer.from_pretrained(out)
    inputs = tokenizer("the cat sat on [MASK] old garden", return_tensors="pt", return_token_type_ids=False)
    logits = model.eval()(**inputs).logits
    built = build(replace(run, precision="float32"), CPU)
    trained = {m.name: checkpoint.Trained(built.models[m.name], m.optimizer) for m in built.cohort.trained}
    checkpoint.load(checkpoint.newest(tmp_path / "run" / "checkpoints"), trained)
    predictor = built.cohort.members["large"].predictor.eval()
    features = predictor(dict(inputs), torch.arange(inputs["input_ids"].numel()))
    bias = 0 if predictor.output_bias is None else predictor.output_bias
    expected = features @ predictor.output_weight.T + bias
    torch.testing.assert_close(logits.flatten(0, 1), expected, rtol=1e-5, atol=1e-5)


def test_a_second_process_in_a_folder_is_refused(text, tmp_path, capsys):
    """Whoever trains there holds a lock, which goes with its process."""
    run, out = small_run("standalone", text, "steps=2"), tmp_path / "run"
    train(run, out)
    program = f"import fcntl, sys; held = open({str(out / '.lock')!r}, 'a'); fcntl.flock(held, fcntl.LOCK_EX)"
    program += "; print(1, flush=True); sys.stdin.read()"
    holder = subprocess.Popen([sys.executable, "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    try:
        assert holder.stdout is not None
        holder.stdout.readline()
        for how in ("resume", "fresh"):
            refused("another process trains there", run, out, **{how: True})
        assert "resuming" not in capsys.readouterr().err
    finally:
        holder.communicate(b"")
    train(run, out, fresh=True)


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.ENOSYS])
def test_a_disk_without_locks_is_used_without(number, tmp_path, monkeypatch):
    import fcntl

    def flock(*_):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", flock)
    with locked(tmp_path / ".lock", wait=False):
        pass
    number = errno.EIO
    with pytest.raises(OSError, match=r"I/O error|Input/output"), locked(tmp_path / ".lock"):
        pass


def test_a_run_that_goes_on_is_not_finished(text, tmp_path):
    """Its old results and models would pass for those of all its steps."""
    run = small_run("standalone", text, "steps=4", "checkpoint.every=2")
    out = train(run, tmp_path / "run")
    longer = replace(run, steps=12)
    with pytest.raises(Stopped):
        train(longer, out, resume=True, accept_changes=True, stop_at=6)
    assert not (out / "results.json").exists()
    assert not (out / "members").exists()
    train(longer, out, resume=True)
    assert json.loads((out / "results.json").read_text())["steps"] == 12


def test_what_a_resumption_changed_is_counted_and_told(text, tmp_path, capsys):
    run = small_run("standalone", text, "steps=4", "checkpoint.every=4", "log.every=1")
    out = train(run, tmp_path / "run")
    other = load(override(to_dict(run), ["steps=6", "data.length=16"]))
    train(other, out, resume=True, accept_changes=True)
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    tokens = [line["tokens"] for line in lines if "tokens" in line]
    assert tokens == [256, 512, 768, 1024, 1024 + 128, 1024 + 256]
    assert json.loads((out / "results.json").read_text())["tokens"] == 1280
    recorded = load(read_run(out / "run.yaml"))
    assert recorded.provenance["changed"] == [{"from_step": 4, "was": {"data.length": 32, "steps": 4}}]
    assert "before step 5: `data.length` (was 32), `steps` (was 4)" in (out / "members/large/README.md").read_text()
    again = train(recorded, tmp_path / "again")
    assert "changed its settings on the way; this run has the last ones throughout" in capsys.readouterr().err
    assert "changed" not in load(read_run(again / "run.yaml")).provenance


def test_what_was_changed_at_a_step_that_is_computed_anew_counts_from_there(text, tmp_path):
    """The checkpoints after step 2 are lost: steps 3 and 4, once of 256 tokens, are computed with the 128 of now."""
    run = small_run("standalone", text, "steps=4", "checkpoint.every=2", "checkpoint.keep=9")
    out = train(run, tmp_path / "run")
    other = load(override(to_dict(run), ["steps=8", "data.length=16"]))
    with pytest.raises(Stopped):
        train(other, out, resume=True, accept_changes=True, stop_at=6)
    assert load(read_run(out / "run.yaml")).provenance["changed"][0]["from_step"] == 4
    for folder in (out / "checkpoints").iterdir():
        if not folder.name.endswith("2"):
            shutil.rmtree(folder)
    train(other, out, resume=True)
    recorded = load(read_run(out / "run.yaml"))
    assert recorded.provenance["changed"] == [{"from_step": 2, "was": {"data.length": 32, "steps": 4}}]
    assert json.loads((out / "results.json").read_text())["tokens"] == 2 * 256 + 6 * 128


def test_a_frozen_member_is_scored_once(text, teacher, tmp_path, monkeypatch):
    loop = sys.modules["codistill.train"]  # the package has a function of that name
    scored: list = []
    once = loop.held_out
    monkeypatch.setattr(loop, "held_out", lambda predictor, *rest: scored.append(predictor) or once(predictor, *rest))
    run = with_teachers("dwt", text, teacher)
    out = train(run, tmp_path / "run")
    assert len(scored) == 3  # of two evaluations the student's, and the teacher's
    assert json.loads((out / "results.json").read_text())["members"]["weak"]["loss"] > 0


def test_results_and_metrics_say_what_happened(text, teacher, tmp_path):
    out = train(with_teachers("dwt", text, teacher), tmp_path / "run")
    results = json.loads((out / "results.json").read_text())
    assert results["members"]["large"]["taught_by"] == ["weak"]
    assert results["members"]["weak"]["frozen"]
    assert results["tokens"] == 20 * 8 * 32
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "held_out" not in line] == [5, 10, 15, 20]
    assert [line["step"] for line in lines if "held_out" in line] == [10, 20]
    assert lines[-1]["held_out"]["large"]["loss"] == results["members"]["large"]["loss"]


@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 75), (signal.SIGINT, 75)])
def test_a_signal_saves_and_says_how_to_go_on(number, status, text, tmp_path):
    run = small_run("standalone", text, "steps=100000", "checkpoint.every=100000")
    (tmp_path / "long.yaml").write_text(to_yaml(run))
    command = ["-c", "from codistill.cli import main; main()", "train", str(tmp_path / "long.yaml")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    process = subprocess.Popen(
        [sys.executable, *command, "--out", str(tmp_path / "run")], env=environment, stdout=subprocess.PIPE, text=True
    )
    while not (tmp_path / "run" / "metrics.jsonl").exists() and process.poll() is None:
        time.sleep(0.1)
    process.send_signal(number)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == status
    assert f"to go on: codistill train {tmp_path / 'run' / 'run.yaml'} --resume" in output
    assert len(list((tmp_path / "run" / "checkpoints").glob("step-*"))) == 1


def test_the_command_that_resumes_resumes(text, tmp_path):
    run = small_run("standalone", text, "steps=6")
    straight = train(run, tmp_path / "straight")
    with pytest.raises(Stopped):
        train(run, tmp_path / "resumed", stop_at=3)
    main(["train", str(tmp_path / "resumed" / "run.yaml"), "--resume"])
    assert_same_run(straight, tmp_path / "resumed")


def test_a_second_interrupt_quits_at_once(text, tmp_path):
    program = f"""
import os, signal, time
from pathlib import Path
from codistill.cohort import Cohort
from codistill.loading import load, read_run
from codistill.train import train
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell makes what it starts in the background ignore it
def step(self, number, batches):
    os.kill(os.getpid(), signal.SIGINT)
    time.sleep(0.5)  # the system may hand a signal to any thread, and two that wait count as one
    print("finishing the step", flush=True)
    os.kill(os.getpid(), signal.SIGINT)
    time.sleep(30)
    print("not reached", flush=True)
Cohort.step = step
train(load(read_run(Path({str(tmp_path / "run.yaml")!r}))), Path({str(tmp_path / "run")!r}))
"""
    (tmp_path / "run.yaml").write_text(to_yaml(small_run("standalone", text)))
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, timeout=120)
    assert done.stdout == "finishing the step\n"
    assert "KeyboardInterrupt" in done.stderr


# ---- what is wrong -----------------------------------------------------------------------------


def test_a_folder_is_not_taken_by_accident(text, tmp_path):
    run = small_run("standalone", text, "steps=2")
    out = train(run, tmp_path / "run")
    refused("holds a finished run; --resume continues it, --fresh replaces it", run, out)
    refused("holds another run: seed was 0 and is now 1", replace(run, seed=1), out, resume=True)
    refused("holds no run to resume", run, tmp_path / "nothing", resume=True)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("years of work")
    (tmp_path / "hidden" / ".git").mkdir(parents=True)
    refused("is no run folder", run, tmp_path / "hidden", fresh=True)
    refused("is no run folder", run, tmp_path / "mine", fresh=True)
    (tmp_path / "mine" / "run.yaml").write_text(to_yaml(run))
    refused("no run was begun there, so --fresh does not delete it", run, tmp_path / "mine", fresh=True)
    assert (tmp_path / "mine" / "thesis.tex").exists()
    (out / "thesis.tex").write_text("years of work")
    refused(r"holds more than a run \(thesis.tex\), and --fresh would delete that too", run, out, fresh=True)
    (out / "thesis.tex").unlink()
    (out / "curves.png").write_text("a picture")
    train(run, out, fresh=True)
    assert not (out / "curves.png").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (["data.train=[]"], "^data.train: no text is named"),
        (["data.validation=[]"], "^data.validation: no text is named"),
        (["data.tokenizer=null"], "^data.tokenizer: none is named and no member is pre-trained"),
        (["data.train=[nowhere.txt]"], "nowhere.txt"),
        (["batch.sequences=100000"], "the text is too short"),
        (["data.length=100000"], "the text is too short"),
    ],
)
def test_unusable_text_is_refused(changes, message, text, tmp_path):
    refused(message, small_run("standalone", text, "batch={sequences: 8}", *changes), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_an_unusable_teacher_is_refused(text, teacher, tmp_path):
    def with_path(path: Path, *more: str):
        return small_run("dwt", text, f"members.weak.path={path}", *more)

    refused("members.weak.path: .* is no model folder", with_path(tmp_path / "none"), tmp_path / "run")
    (tmp_path / "gpt").mkdir()
    (tmp_path / "gpt" / "config.json").write_text('{"model_type": "gpt2"}')
    refused(
        "gpt2 is a causal LM, and objective.name mlm is for masked ones: bert",
        with_path(tmp_path / "gpt"),
        tmp_path / "run",
    )
    (tmp_path / "gpt" / "config.json").write_text('{"model_type": "vit"}')
    refused("is of the family 'vit'; supported are bert, modernbert", with_path(tmp_path / "gpt"), tmp_path / "run")
    (tmp_path / "gpt" / "config.json").write_text("{")
    refused("members.weak.path: .* cannot be loaded", with_path(tmp_path / "gpt"), tmp_path / "run")
    copy = tmp_path / "copy"
    copy.mkdir()
    for file in teacher.iterdir():
        (copy / file.name).write_bytes(file.read_bytes())
    (copy / "model.safetensors").write_bytes((teacher / "model.safetensors").read_bytes()[:-100])
    refused("the weights in .* cannot be read", with_path(copy, "data.tokenizer=null"), tmp_path / "run")
    other = with_path(teacher, "data.tokenizer='train:bpe:300'")
    refused(r"has another tokenizer than the run's .*is id .* in the one and", other, tmp_path / "run")
    longer = with_path(teacher, "data.tokenizer=null", "data.length=600", "batch.sequences=2", "batch.accumulate=1")
    refused("data.length: 600 is more than the 512 positions of members.weak", longer, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_teacher_of_text_in_another_case_is_refused(text, teacher, tmp_path):
    """Its vocabulary is the run's, and it would be shown words that it never saw."""
    cased = tmp_path / "cased"
    shutil.copytree(teacher, cased)
    tree = json.loads((cased / "tokenizer.json").read_text())
    tree["normalizer"] = {"type": "NFC"}
    (cased / "tokenizer.json").write_text(json.dumps(tree))
    same = small_run("dwt", text, f"members.weak.path={cased}", f"data.tokenizer={cased}", "steps=1")
    other = small_run("dwt", text, f"members.weak.path={cased}", f"data.tokenizer={teacher}", "steps=1")
    train(same, tmp_path / "same")
    refused(r"^members\.weak: .*another way to them.*'The House' is .* to it and the ", other, tmp_path / "other")
    assert not (tmp_path / "other").exists()


def test_another_tokenizer_is_refused_before_text_is_prepared(text, teacher, tmp_path, monkeypatch):
    cache, vocabulary = tmp_path / "cache", tmp_path / "vocab.txt"
    monkeypatch.setenv("CODISTILL_CACHE", str(cache))
    vocabulary.write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *"abcdefghijklmnopqrstuvwxyz"]))
    named = small_run("dwt", text, f"members.weak.path={teacher}", f"data.tokenizer={vocabulary}")
    refused("has another tokenizer than the run's", named, tmp_path / "run")
    assert not (cache / "corpora").exists()
    trained = small_run("dwt", text, f"members.weak.path={teacher}", "data.tokenizer='train:bpe:300'")
    refused("has another tokenizer than the run's", trained, tmp_path / "run")
    assert len(list((cache / "corpora").iterdir())) == 1  # without the held-out text


def test_a_loss_that_is_not_finite_stops_the_run_and_names_step_member_and_rows(text, tmp_path):
    run = small_run("standalone", text, "members.large.lr=1e30", "members.large.clip=1e30", "precision=float32")
    with pytest.raises(
        NonFiniteError, match=r"step \d+: the loss or gradient of large .* held the rows [\d, ]+ of data"
    ):
        train(run, tmp_path / "run")
    assert not (tmp_path / "run" / "results.json").exists()


def test_a_member_whose_loss_is_no_number_in_the_end_is_no_success(text, tmp_path, capsys):
    """The first step's update is finite and much too large: every later one is skipped, 9 of 10."""
    run = small_run("standalone", text, "members.large.lr=1e30", "members.large.clip=1e30", "precision=float32")
    file, out = tmp_path / "broken.yaml", tmp_path / "run"
    file.write_text(to_yaml(replace(run, steps=10, non_finite="skip", checkpoint=Checkpointing(keep_best=True))))
    with pytest.raises(SystemExit) as ended:
        main(["train", str(file), "--out", str(out)])
    said = capsys.readouterr()
    assert ended.value.code == 2
    assert "9 of 10 steps were skipped" in said.out
    assert f"{out}: the held-out loss of large is no number after 10 steps; lower" in said.err
    for written in [out / "results.json", *out.glob("checkpoints/*/manifest.json")]:
        found = json.loads(written.read_text(), parse_constant=pytest.fail)
        assert found.get("skipped", 9) == 9
    results = json.loads((out / "results.json").read_text())["members"]["large"]
    assert (results["loss"], results["perplexity"], results["best"]) == (None, None, None)
    card = (out / "members" / "large" / "README.md").read_text()
    assert "| loss (nats) | no number |" in card
    assert "9 of the steps were skipped" in card
    assert "9 of 10 steps were skipped" in to_markdown(section(out))
    with pytest.raises(NonFiniteError, match="the held-out loss of large is no number"):
        work({"run": str(out / "run.yaml"), "out": str(out), "device": "cpu", "members": ["large"], "tasks": [],
              "peers": {}, "data": None, "pairs": None})  # fmt: skip


def test_a_full_disk_is_one_line_and_no_finished_folder(text, tmp_path, monkeypatch):
    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint, "save_file", full)
    with pytest.raises(MachineError, match="No space left on device; free some space and resume"):
        train(small_run("standalone", text), tmp_path / "run")
    assert not (tmp_path / "run" / "results.json").exists()


def test_a_disk_that_fills_up_loses_no_good_checkpoint(text, tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=1500k", "tmpfs", str(disk)]
    if os.name != "posix" or subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("mounting a small tmpfs needs root; the simulated full disk is tested above")
    try:
        run = small_run("standalone", text, "checkpoint={every: 2, keep: 100}", "steps=40", "log.every=2")
        with pytest.raises(MachineError, match=r"No space left on device"):
            train(run, disk / "run")
        good = checkpoint.newest(disk / "run" / "checkpoints")
        assert good is not None
        assert not (disk / "run" / "results.json").exists()
        assert not list((disk / "run" / "checkpoints").glob(".*"))
    finally:
        subprocess.run(["umount", str(disk)], check=True)
