"""Text from trained members, and the cards that come with them."""

import shutil

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from codistill.cli import main
from codistill.errors import UserError
from codistill.generate import generate
from codistill.loading import load, read_run
from codistill.train import train
from runs import small_run, with_teachers


@pytest.fixture(scope="module")
def folder(text, causal_teacher, tmp_path_factory):
    run = with_teachers("dwt-clm", text, causal_teacher, "steps=150", "members.large.lr=1e-2", "precision=float32")
    return train(run, tmp_path_factory.mktemp("generate") / "run", device="cpu")


def test_it_goes_on_as_the_model_itself_would(folder):
    """Token by token with the plain model: the likeliest each time."""
    place = folder / "members" / "large"
    model, tokenizer = AutoModelForCausalLM.from_pretrained(place).eval(), AutoTokenizer.from_pretrained(place)
    ids = [tokenizer.cls_token_id, *tokenizer("the cat", add_special_tokens=False)["input_ids"]]
    with torch.no_grad():
        for _ in range(12):
            ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
    assert tokenizer.sep_token_id not in ids
    assert generate(folder, "large", "the cat", tokens=12, temperature=0, device="cpu") == tokenizer.decode(
        ids, skip_special_tokens=True
    )


def test_a_seed_repeats_the_text_and_another_does_not(folder):
    one, again, other = (
        generate(folder, "large", "the", tokens=20, temperature=1.5, seed=s, device="cpu") for s in (1, 1, 2)
    )
    assert one == again != other
    assert one.startswith("the ")


def test_the_command_prints_text_of_the_vocabulary(folder, text, capsys):
    main(["generate", str(folder), "the cat", "--member", "weak", "--tokens", "8", "--device", "cpu"])
    assert capsys.readouterr().out.startswith("the cat")


def test_padding_rows_of_a_model_are_never_written(folder, tmp_path):
    wide = shutil.copytree(folder, tmp_path / "wide")
    place = wide / "members" / "large"
    model, tokenizer = AutoModelForCausalLM.from_pretrained(place), AutoTokenizer.from_pretrained(place)
    before = generate(folder, "large", "the", tokens=10, temperature=0, device="cpu")
    model.resize_token_embeddings(model.config.vocab_size + 9, mean_resizing=False)
    with torch.no_grad():
        rows = model.get_output_embeddings().weight
        shown = torch.tensor([[tokenizer.cls_token_id, *tokenizer("the", add_special_tokens=False)["input_ids"]]])
        rows[-9:] = 3 * rows[model(shown).logits[0, -1].argmax()]
        assert model(shown).logits[0, -1].argmax() >= len(rows) - 9
    model.save_pretrained(place)
    assert generate(wide, "large", "the", tokens=10, temperature=0, device="cpu") == before


def test_settings_that_a_member_brings_have_no_say(folder, tmp_path):
    """Such as a maker's repetition penalty, which changes the likeliest token, or top_p, which hides others."""
    penal = shutil.copytree(folder, tmp_path / "penal")
    GenerationConfig(
        do_sample=True, repetition_penalty=5.0, top_p=1e-4, no_repeat_ngram_size=1, min_new_tokens=19, num_beams=2
    ).save_pretrained(penal / "members" / "large")
    for how in ({"temperature": 0}, {"temperature": 1.5, "seed": 1}):
        one, other = (generate(place, "large", "the", tokens=20, device="cpu", **how) for place in (folder, penal))
        assert one == other, how


def test_what_cannot_go_on_is_refused(folder, teacher, tmp_path):
    with pytest.raises(UserError, match=r"--member small: .* has no such member; there are large, weak"):
        generate(folder, "small", "the")
    with pytest.raises(UserError, match="holds no run; give the folder of a finished run"):
        generate(tmp_path, "large", "the")
    with pytest.raises(UserError, match="modernbert is not a causal language model"):
        generate(teacher.parents[1], "large", "the")
    with pytest.raises(UserError, match="--tokens 600: with the prompt's 2 that exceeds the 512 positions of large"):
        generate(folder, "large", "the", tokens=600)


def test_every_member_has_a_card(folder):
    run = load(read_run(folder / "run.yaml"))
    card = (folder / "members" / "large" / "README.md").read_text()
    assert card.startswith("---\nlibrary_name: transformers\npipeline_tag: text-generation\n")
    assert "# large\n\nA causal language model of 0.0" in card
    assert "a run of `dwt-clm:tiny`" in card
    assert "| `weak`, begun as `large`; frozen | forward_kl | 1.0 | 1.0 |" in card
    assert f"{run.provenance['data']['train']['tokens']:,} tokens (content " in card
    assert "tokens in 150 steps of 8 × 32 tokens" in card
    assert str(folder.parent) not in card
    assert "AutoModelForCausalLM.from_pretrained" in card
    assert "model.generate(**prompt, max_new_tokens=40, do_sample=False)" in card
    weak = (folder / "members" / "weak" / "README.md").read_text()
    assert "taken as it was and not trained" in weak


def test_a_masked_members_card(text, tmp_path):
    out = train(small_run("ctcd", text, "steps=2"), tmp_path / "run", device="cpu")
    card = (out / "members" / "small" / "README.md").read_text()
    assert "A masked language model" in card
    assert "| `large` (modernbert, 2 layers × 32), initialised at random; trained beside it | forward_kl |" in card
    assert "pipeline_tag: fill-mask" in card
    assert "generate" not in card
