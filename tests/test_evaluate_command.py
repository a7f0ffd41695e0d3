"""codistill evaluate: models as they are named, what is printed, and the exit status."""

import json
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AlbertConfig, AlbertForMaskedLM

from codistill.cli import main
from codistill.errors import UserError
from codistill.evaluate.run import evaluate
from codistill.evaluate.subjects import find_models, load_subject
from codistill.train import train
from evaluations import QUICK, glue_folder, model_folder, pairs, sentences, write
from runs import small_run

SOURCE = str(Path(__file__).parents[1] / "src")
SET = ["--set", "epochs=1", "--set", "max_length=32", "--set", "held_out_length=32"]


@pytest.fixture(scope="module")
def run(text, tmp_path_factory):
    """The folder of a finished run of two members."""
    return train(small_run("ctcd", text, "steps=2"), tmp_path_factory.mktemp("runs") / "pair")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return model_folder(tmp_path_factory.mktemp("models") / "one")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return glue_folder(tmp_path_factory.mktemp("data"), "sst2", "wnli", train=64, dev=32)


def status(*arguments) -> int:
    with pytest.raises(SystemExit) as stopped:
        main([str(argument) for argument in arguments])
    return stopped.value.code


def test_all_members_of_a_run_side_by_side(run, data, text, tmp_path, capsys):
    out = tmp_path / "out"
    arguments = ["--tasks", "mlm,glue/wnli,glue/sst2", "--data", data, "--text", text, "--seeds", 2, "--out", out]
    main(["evaluate", str(run), *map(str, arguments), *SET])
    printed = capsys.readouterr().out
    for part in ("pair/large", "pair/small", "glue/wnli", "GLUE average, with WNLI", "Differences to pair/large", "±"):
        assert part in printed
    results = json.loads((out / "results.json").read_text())
    assert len(results["cells"]) == 2 + 2 * 2 * 2
    assert len(list((out / "cells").iterdir())) == len(results["cells"])
    for model in ("pair/large", "pair/small"):
        scores = [c["score"] for c in results["cells"] if (c["model"], c["task"]) == (model, "glue/sst2")]
        assert results["comparisons"]["tasks"]["glue/sst2"][model]["mean"] == pytest.approx(sum(scores) / 2)
    assert results["protocol"]["epochs"] == 1
    assert results["comparisons"]["averages"]["pair/small"]["with_wnli"]["of"] == ["sst2", "wnli"]
    assert "partial: glue/wnli (train 64 of 635, dev 32 of 71 examples)" in printed


def test_what_earlier_calls_found_is_kept_and_counted(folder, data, text, tmp_path, capsys):
    """The table is of what is asked for; to ask for all together computes nothing again."""
    rates = [*SET, "--set", "learning_rates=[1e-2,1e-3]"]  # the choice among them is kept too, and is no cell
    asked = ["evaluate", str(folder), "--data", str(data), "--text", str(text), "--out", str(tmp_path / "out"), *rates]

    def shown(*tasks: str) -> tuple[list[str], int, str]:
        main([*asked, "--tasks", ",".join(tasks)])
        results = json.loads((tmp_path / "out/results.json").read_text())
        return [cell["task"] for cell in results["cells"]], results["kept"], capsys.readouterr().out

    assert "kept" not in shown("glue/wnli", "glue/sst2")[2]
    found, kept, printed = shown("mlm")
    assert (found, kept) == (["mlm"], 2)
    assert "kept: 2 more cells of earlier calls" in printed
    before = sorted(file.stat().st_mtime_ns for file in (tmp_path / "out/cells").iterdir())
    assert shown("mlm", "glue/wnli", "glue/sst2")[:2] == (["mlm", "glue/wnli", "glue/sst2"], 0)
    assert sorted(file.stat().st_mtime_ns for file in (tmp_path / "out/cells").iterdir()) == before


def test_a_failure_is_printed_and_is_the_exit_status(folder, data, tmp_path, capsys):
    asked = ["evaluate", folder, "--tasks", "blimp,glue/wnli", "--data", data, "--out", tmp_path / "out", *SET]
    assert status(*asked) == 2
    printed = capsys.readouterr().out
    assert "failed: blimp of one" in printed
    assert "it has no blimp/*.parquet" in printed


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--tasks", "glu"], "--tasks: there is no task 'glu' (did you mean"),
        (["--tasks", "glue/wnli", "--seeds", "0"], "--seeds 0: at least one is needed"),
        (["--tasks", "glue/wnli", "--set", "epoch=1"], "epoch: there is no such setting (did you mean epochs?)"),
        (["--tasks", "glue/wnli", "--set", "dropout=2"], "dropout: 2.0 came in where at most 0.9 is wanted"),
    ],
)
def test_a_mistake_is_one_line(folder, tmp_path, arguments, message, capsys):
    assert status("evaluate", folder, "--out", tmp_path / "out", *arguments) == 2
    error = capsys.readouterr().err
    assert message in error
    assert "Traceback" not in error
    assert not (tmp_path / "out").exists()


def test_help_and_mistakes_need_no_torch(tmp_path):
    program = (
        "import sys; from codistill.cli import main\n"
        "wrong = ['evaluate', 'a', '--tasks', 'mlm', '--out', 'b', '--set', 'x=1']\n"
        "for arguments in (['evaluate', '--help'], wrong):\n"
        "    try: main(arguments)\n    except SystemExit: pass\n"
        "assert not {'torch', 'transformers', 'numpy'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, env={"PYTHONPATH": SOURCE})


def test_the_public_function_is_no_module():
    program = "import codistill; codistill.evaluate; import codistill.evaluate.run; assert callable(codistill.evaluate)"
    subprocess.run([sys.executable, "-c", program], check=True, env={"PYTHONPATH": SOURCE})


def test_a_folder_with_something_else_is_not_touched(folder, data, tmp_path):
    (tmp_path / "mine.txt").write_text("mine")
    with pytest.raises(UserError, match="holds something else than an evaluation"):
        evaluate([str(folder)], ["glue/wnli"], tmp_path, data=data)


@pytest.mark.parametrize("family", ["gpt2", "qwen3", "bert"])
def test_every_kind_of_family(text, data, tmp_path, family):
    other = model_folder(tmp_path / family, family=family)
    write(tmp_path / "blimp/test.parquet", pairs(9))
    zero_shot = {"data": tmp_path, "text": [str(text)], "protocol": QUICK}
    results = evaluate([str(other)], ["mlm", "blimp"], tmp_path / "out", **zero_shot)
    assert not any(cell["failed"] for cell in results["cells"])
    method = results["cells"][1]["counted"]["method"]
    assert method == ("pseudo-log-likelihood" if family == "bert" else "log-likelihood")
    tuned = evaluate([str(other)], ["glue/wnli"], tmp_path / "tuned", data=data, protocol=replace(QUICK, epochs=8))
    assert tuned["cells"][0]["score"] > 0.8


def test_a_family_that_no_table_knows(data, tmp_path):
    place = model_folder(tmp_path / "albert")
    size = {"hidden_size": 32, "embedding_size": 16, "num_attention_heads": 2, "intermediate_size": 32}
    AlbertForMaskedLM(AlbertConfig(vocab_size=100, num_hidden_layers=1, **size)).save_pretrained(place)
    write(tmp_path / "blimp/test.parquet", pairs(9))
    found = evaluate([str(place)], ["blimp"], tmp_path / "out", data=tmp_path, protocol=QUICK)["cells"]
    found += evaluate([str(place)], ["glue/wnli"], tmp_path / "tuned", data=data, protocol=QUICK)["cells"]
    assert [cell["failed"] for cell in found] == ["", ""]
    assert found[0]["counted"]["method"] == "pseudo-log-likelihood"


# ---- models ------------------------------------------------------------------------------------


def test_the_column_of_held_out_text_can_be_named(folder, tmp_path):
    one, other = sentences(60, 3), sentences(60, 4)
    write(tmp_path / "usual.parquet", {"text": one, "body": other})
    write(tmp_path / "named.parquet", {"text": other, "body": one})

    def cell(file: str, column: str) -> dict:
        protocol, text = replace(QUICK, held_out_column=column), [str(tmp_path / file)]
        return evaluate([str(folder)], ["mlm"], tmp_path / "out", text=text, protocol=protocol)["cells"][0]

    wanted = cell("usual.parquet", "text")["score"]
    assert cell("named.parquet", "body")["score"] == wanted
    assert cell("named.parquet", "text")["score"] != wanted  # and not the cell of the other column
    assert "words" in cell("named.parquet", "words")["failed"]


def test_the_same_text_in_other_sources_is_another_cell(folder, tmp_path):
    tx = tmp_path / "tx"
    tx.mkdir()
    for seed, name in enumerate("ab"):
        (tx / f"{name}.txt").write_text(". ".join(sentences(60, seed)))

    def counted(*text: Path) -> dict:
        named = [str(place) for place in text]
        return evaluate([str(folder)], ["mlm"], tmp_path / "out", text=named, protocol=QUICK)["cells"][0]["counted"]

    files = [tx / "a.txt", tx / "b.txt"]
    assert len(counted(tx)["loss_by_source"]) == 1
    each = {file.name: next(iter(counted(file)["loss_by_source"].values())) for file in files}
    assert counted(*files)["loss_by_source"] == {f"tx/{name}": loss for name, loss in each.items()}


def test_names_of_models(run, folder):
    assert list(find_models([str(run)])) == ["pair/large", "pair/small"]
    assert list(find_models([str(run / "members" / "small"), str(folder)])) == ["pair/small", "one"]
    assert find_models(["google/some-model"]) == {"google/some-model": "google/some-model"}


def test_two_models_of_one_name(folder, tmp_path):
    shutil.copytree(folder, tmp_path / "one")
    with pytest.raises(UserError, match="would both be called one"):
        find_models([str(folder), str(tmp_path / "one")])


def test_a_run_without_members(tmp_path):
    (tmp_path / "run.yaml").write_text("")
    with pytest.raises(UserError, match="is not finished; codistill train --resume goes on with it"):
        find_models([str(tmp_path)])


def damaged(folder, place, keep):
    """A copy of the model with only those tensors that `keep` wants."""
    shutil.copytree(folder, place)
    tensors = {name: tensor for name, tensor in load_file(folder / "model.safetensors").items() if keep(name)}
    save_file(tensors, place / "model.safetensors", metadata={"format": "pt"})
    return place


def test_a_model_without_its_head_is_fine_tuned_but_scores_no_text(folder, data, text, tmp_path):
    headless = damaged(folder, tmp_path / "headless", lambda name: name.startswith("model."))
    ask = {"data": data, "text": [str(text)], "protocol": QUICK}
    results = evaluate([str(headless), str(folder)], ["mlm", "glue/wnli"], tmp_path / "out", **ask)
    found = {(cell["model"], cell["task"]): cell for cell in results["cells"]}
    assert "lacks" in found["headless", "mlm"]["failed"]
    assert found["one", "mlm"]["score"] is not None
    assert found["headless", "glue/wnli"]["score"] == found["one", "glue/wnli"]["score"]
    first = (tmp_path / "out/cells").stat().st_mtime_ns
    assert evaluate([str(headless)], ["glue/wnli"], tmp_path / "out", **ask)["cells"][0]["score"] is not None
    assert (tmp_path / "out/cells").stat().st_mtime_ns == first  # its content is known by its backbone


def test_a_model_without_its_backbone(folder, data, tmp_path):
    broken = damaged(folder, tmp_path / "broken", lambda name: "layers.0" not in name)
    results = evaluate([str(broken), str(folder)], ["glue/wnli"], tmp_path / "out", data=data, protocol=QUICK)
    found = {cell["model"]: cell for cell in results["cells"]}
    assert "lacks" in found["broken"]["failed"]
    assert found["one"]["score"] is not None


def test_a_model_with_no_tokenizer_or_anothers(folder, tmp_path):
    cpu = torch.device("cpu")
    shutil.copytree(folder, tmp_path / "none", ignore=shutil.ignore_patterns("tokenizer*"))
    with pytest.raises(UserError, match="has no tokenizer beside it"):
        load_subject("none", str(tmp_path / "none"), cpu)
    shutil.copytree(folder, tmp_path / "other")
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    tokenizer["model"]["vocab"] |= {f"more{i}": 100 + i for i in range(50)}
    (tmp_path / "other/tokenizer.json").write_text(json.dumps(tokenizer))
    with pytest.raises(UserError, match="it is another model's"):
        load_subject("other", str(tmp_path / "other"), cpu)


def test_a_model_is_known_by_its_content(folder, tmp_path):
    cpu = torch.device("cpu")
    one = load_subject("one", str(folder), cpu).content
    shutil.copytree(folder, tmp_path / "copy")
    assert load_subject("copy", str(tmp_path / "copy"), cpu).content == one
    tensors = load_file(folder / "model.safetensors")
    next(iter(tensors.values())).view(-1)[0] += 1
    save_file(tensors, tmp_path / "copy/model.safetensors", metadata={"format": "pt"})
    assert load_subject("copy", str(tmp_path / "copy"), cpu).content != one
