"""The tokenizer beside a member: for `generate` of plain transformers, and for codistill as the run's own."""

import logging
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer, BertTokenizer

from codistill.build import build
from codistill.cli import main
from codistill.data.saved_tokenizer import tokenizer_to_save
from codistill.data.tokenizers import Vocabulary, load_tokenizer, tokenizer_hash, train_tokenizer
from codistill.errors import UserError
from codistill.evaluate.encode import encode
from codistill.evaluate.glue import Group, _check_tokenizers
from codistill.generate import generate
from codistill.loading import load, override, read_run, to_dict
from codistill.train import train
from runs import small_run

KINDS = ["bpe:300", "wordpiece:100"]


@pytest.fixture(scope="module", params=KINDS)
def folder(request, text, tmp_path_factory):
    settings = ["steps=60", "members.large.lr=1e-2", "precision=float32", f"data.tokenizer=train:{request.param}"]
    return train(small_run("standalone-clm", text, *settings), tmp_path_factory.mktemp("run") / "run", device="cpu")


def generated(folder, prompt: str, capsys, tokens: int = 20) -> str:
    """What the command says; the end of its line is not of the text."""
    ask = ["--member", "large", "--tokens", str(tokens), "--temperature", "0", "--device", "cpu"]
    capsys.readouterr()
    main(["generate", str(folder), prompt, *ask])
    return capsys.readouterr().out.removesuffix("\n")


def goes_on(place, prompt: str) -> str:
    """What a user of transformers gets."""
    model, tokenizer = AutoModelForCausalLM.from_pretrained(place), AutoTokenizer.from_pretrained(place)
    made = model.generate(**tokenizer(prompt, return_tensors="pt"), max_new_tokens=20, do_sample=False)
    return tokenizer.decode(made[0], skip_special_tokens=True)


@pytest.mark.parametrize("prompt", ["the cat", "our old"])
def test_transformers_goes_on_with_a_prompt_as_the_command_does(folder, prompt, tmp_path, capsys):
    main(["export", str(folder), "--member", "large", "--out", str(tmp_path / "large")])
    wanted = generated(folder, prompt, capsys)
    assert wanted.startswith(prompt)
    assert len(wanted) > len(prompt) + 10
    assert goes_on(tmp_path / "large", prompt) == wanted
    assert goes_on(folder / "members" / "large", prompt) == wanted


def test_the_cards_example_is_what_the_command_says(folder, capsys):
    place = folder / "members" / "large"
    example = (place / "README.md").read_text().split("```python\n")[1].split("```")[0]
    wanted = generated(folder, "The old king", capsys, tokens=40)
    exec(example.replace("FOLDER", str(place)), {})
    assert capsys.readouterr().out.removesuffix("\n") == wanted


def test_a_prompt_is_open_and_its_tokens_have_names(folder):
    tokenizer = AutoTokenizer.from_pretrained(folder / "members" / "large")
    start, end = (tokenizer.get_vocab()[token] for token in ("[CLS]", "[SEP]"))
    ids = tokenizer("the cat").input_ids
    assert ids[0] == start
    assert end not in ids
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id) == (start, end)


def test_a_member_of_an_earlier_version_is_exported_with_open_prompts(folder, tmp_path, capsys):
    old = shutil.copytree(folder, tmp_path / "old")
    trained = build(run_of(folder), torch.device("cpu")).tokenizer
    assert trained("the cat").input_ids[-1] == trained.sep_token_id
    trained.save_pretrained(old / "members" / "large")
    main(["export", str(old), "--member", "large", "--out", str(tmp_path / "large")])
    assert goes_on(tmp_path / "large", "the cat") == generated(old, "the cat", capsys)


def run_of(folder, *more: str):
    run = load(read_run(folder / "run.yaml"))
    return load(override(to_dict(run), ["provenance=null", *more]))


def test_a_members_tokenizer_serves_another_run_as_the_first_ones_own(folder, tmp_path):
    """Named, or found beside a pre-trained member: the same rows, and the same facts of the run. Text that a tokenizer
    prepared before it was saved is not prepared anew."""
    place, cpu = folder / "members" / "large", torch.device("cpu")
    first = build(run_of(folder), cpu)
    first.tokenizer.save_pretrained(tmp_path)  # as members of earlier versions have it
    first = build(run_of(folder, f"data.tokenizer={tmp_path}"), cpu)
    runs = {
        "named": run_of(folder, f"data.tokenizer={place}"),
        "beside a member": run_of(folder, "data.tokenizer=null", f"members.large={{path: {place}}}"),
    }
    for how, run in runs.items():
        again = build(run, cpu)
        for fact in ("tokenizer", "special_tokens", "data"):
            assert again.provenance[fact] == first.provenance[fact], how
        for one, other in zip(again.batches.at(0), first.batches.at(0), strict=True):
            assert torch.equal(one.inputs["input_ids"], other.inputs["input_ids"]), how


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_that_training_knows_of_a_tokenizer_changes(kind, tmp_path):
    name, size = kind.split(":")
    trained = train_tokenizer(name, int(size), ["the cat sat"])
    rules = trained.backend_tokenizer.to_str()
    tokenizer_to_save(trained, is_causal=True).save_pretrained(tmp_path)
    saved = load_tokenizer(tmp_path)
    assert trained.backend_tokenizer.to_str() == rules
    assert tokenizer_hash(saved) == tokenizer_hash(trained)
    one, other = vars(Vocabulary.of(saved)), vars(Vocabulary.of(trained))
    assert all(np.array_equal(one[role], other[role]) for role in other)
    masked = tokenizer_to_save(trained, is_causal=False)
    assert masked.backend_tokenizer.to_str() == rules
    assert (masked.bos_token, masked.eos_token) == (None, None)


def test_a_tokenizer_of_a_class_of_its_own_leaves_prompts_open_too(tmp_path):
    """BERT's puts its separator back whenever it is loaded, and gives types that causal models do not take."""
    words = {word: number for number, word in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "b"])}
    tokenizer_to_save(BertTokenizer(vocab=words), is_causal=True).save_pretrained(tmp_path)
    assert dict(AutoTokenizer.from_pretrained(tmp_path)("A b")) == {"input_ids": [2, 5, 6], "attention_mask": [1, 1, 1]}
    assert load_tokenizer(tmp_path).is_fast


def test_texts_that_are_judged_are_closed_all_the_same():
    """Fine-tuning reads the last token of a causal model: the separator, as before tokenizers left prompts open."""
    trained = train_tokenizer("wordpiece", 64, ["a b"])
    saved = tokenizer_to_save(trained, is_causal=True)
    a, b = (trained.get_vocab()[letter] for letter in "ab")
    single = encode([["a b"]], saved, max_length=9, with_types=True)
    pair = encode([["a"], ["b"]], saved, max_length=9, with_types=True)
    assert single.ids[0].tolist() == [2, a, b, 3]
    assert pair.ids[0].tolist() == [2, a, 3, b, 3]
    assert pair.types[0].tolist() == [0, 0, 0, 1, 1]
    assert encode([["a b"]], saved, max_length=3, with_types=False).ids[0].tolist() == [2, a, 3]


def test_a_causal_and_a_masked_member_of_one_tokenizer_may_be_fine_tuned_together():
    trained = train_tokenizer("wordpiece", 64, ["a b"])
    causal, masked = (SimpleNamespace(tokenizer=tokenizer_to_save(trained, is_causal=is_it)) for is_it in (True, False))
    _check_tokenizers(Group({"causal": causal, "masked": masked}))
    other = SimpleNamespace(tokenizer=train_tokenizer("wordpiece", 64, ["a c"]))
    with pytest.raises(UserError, match="causal and other have different tokenizers"):
        _check_tokenizers(Group({"causal": causal, "other": other}))


def test_a_tokenizer_that_closes_nothing_stays_as_its_maker_left_it(tmp_path):
    trained = train_tokenizer("bpe", 300, ["the cat sat"])
    trained.backend_tokenizer.model.save(str(tmp_path))
    plain = load_tokenizer(tmp_path)
    plain.add_special_tokens({"eos_token": "<|endoftext|>"})
    saved = tokenizer_to_save(plain, is_causal=True)
    assert saved("the cat").input_ids == plain("the cat").input_ids
    assert (saved.bos_token, saved.eos_token) == (None, "<|endoftext|>")


def test_a_prompt_that_is_too_long_is_one_line(folder, caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    with pytest.raises(UserError, match="exceeds the 512 positions of large"):
        generate(folder, "large", "the cat " * 600, device="cpu")
    assert not caplog.records


@pytest.mark.parametrize(("family", "recipe"), [("roberta", "standalone"), ("gpt2", "standalone-clm")])
def test_a_long_text_is_cut_to_what_the_member_takes(family, recipe, text, tmp_path):
    """RoBERTa counts positions from its padding token on, so its configuration names more than it takes."""
    run = small_run(recipe, text, "steps=1", f"members.large.model.family={family}")
    place = train(run, tmp_path / "run", device="cpu") / "members" / "large"
    model, tokenizer = AutoModel.from_pretrained(place), AutoTokenizer.from_pretrained(place)
    ids = tokenizer("the cat " * 600, truncation=True, return_tensors="pt", return_token_type_ids=False)
    assert ids["input_ids"].shape == (1, 512)
    assert torch.isfinite(model(**ids).last_hidden_state).all()
    again = build(run_of(tmp_path / "run", f"data.tokenizer={place}"), torch.device("cpu")).provenance
    assert again["tokenizer"] == load(read_run(tmp_path / "run" / "run.yaml")).provenance["tokenizer"]
