"""Folders: what is written loads, in bounded memory, completely or not at all."""

import ctypes
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, LlamaConfig

from codistill.errors import MachineError, UserError
from codistill.remap import files, initial_state, remap_folder, remap_state
from remap_models import CLASSES, FAMILIES, VOCABULARY, build, config_of, distance, drawn, one_thread  # noqa: F401


def saved(config, folder, shard="1GB"):
    model = drawn(config)
    model.save_pretrained(folder, max_shard_size=shard)
    return model


@pytest.mark.parametrize("family", FAMILIES)
def test_a_folder_that_transformers_loads(family, tmp_path):
    config, target = config_of(family), config_of(family, 3, 16, 4, 24)
    model = saved(config, tmp_path / "small", shard="2KB")
    (tmp_path / "small" / "tokenizer.json").write_text("{}")
    assert len(list((tmp_path / "small").glob("*.safetensors"))) > 1
    out = remap_folder(
        tmp_path / "small", target, depth="identity", width="tile", out=tmp_path / "large", shard_bytes=3000
    )
    large, report = CLASSES[family].from_pretrained(out, output_loading_info=True, dtype="auto")
    assert not any(report.values()), report
    assert large.dtype == torch.float64
    assert distance(model, large.eval()) < 1e-10
    assert AutoConfig.from_pretrained(out).architectures == [CLASSES[family].__name__]
    assert (out / "tokenizer.json").read_text() == "{}"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["large", "small"]
    expected = remap_state(model.state_dict(), config, target, depth="identity", width="tile")
    for name, tensor in initial_state(tmp_path / "small", target, depth="identity", width="tile").items():
        assert torch.equal(tensor, expected[name])


def test_the_target_as_a_dictionary_a_file_and_a_folder(tmp_path):
    saved(config_of("bert"), tmp_path / "small")
    config_of("bert", 3).save_pretrained(tmp_path / "target")
    content = json.loads((tmp_path / "target" / "config.json").read_text())
    for i, to in enumerate([content, tmp_path / "target", tmp_path / "target" / "config.json"]):
        out = remap_folder(tmp_path / "small", to, depth="stack", out=tmp_path / str(i))
        assert build(files.read_config(out), load_tied(out)).config.num_hidden_layers == 3


def load_tied(folder):
    return initial_state(folder, files.read_config(folder))


def test_names_of_published_checkpoints(tmp_path):
    """An old BERT calls gains gamma and has a pooler, GPT-2 leaves out its prefix and stores its causal mask."""
    model = saved(config_of("bert"), tmp_path / "bert")
    state = load_file(tmp_path / "bert" / "model.safetensors")
    state = {
        name.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta"): tensor
        for name, tensor in state.items()
    }
    state |= {"bert.pooler.dense.weight": torch.zeros(8, 8), "cls.seq_relationship.bias": torch.zeros(2)}
    save_file(state, tmp_path / "bert" / "model.safetensors")
    for name, tensor in initial_state(tmp_path / "bert", model.config).items():
        assert torch.equal(tensor, model.state_dict()[name])

    model = saved(config_of("gpt2"), tmp_path / "gpt2")
    state = load_file(tmp_path / "gpt2" / "model.safetensors")
    state = {name.removeprefix("transformer."): tensor for name, tensor in state.items()}
    state |= {"h.0.attn.bias": torch.ones(1, 1, 20, 20)}
    save_file(state, tmp_path / "gpt2" / "model.safetensors")
    for name, tensor in initial_state(tmp_path / "gpt2", model.config).items():
        assert torch.equal(tensor, model.state_dict()[name])


def anonymous_bytes():
    """Memory of this process that no file backs."""
    status = Path("/proc/self/status").read_text()
    return int(status.split("RssAnon:")[1].split()[0]) * 1024


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "malloc_trim"), reason="measures memory as Linux and glibc do")
def test_memory_is_bounded_by_a_shard_and_a_tensor(tmp_path, monkeypatch):
    """48 layers of 5 MB, 252 MB, are written with less than 30 MB in memory at any tensor or shard."""
    sizes = {"vocab_size": VOCABULARY, "hidden_size": 256, "num_attention_heads": 4, "intermediate_size": 682}
    source = LlamaConfig(num_hidden_layers=24, **sizes)
    CLASSES["llama"](source).save_pretrained(tmp_path / "small", max_shard_size="6MB")
    assert len(list((tmp_path / "small").glob("*.safetensors"))) > 10
    ctypes.CDLL(None).malloc_trim(0)  # what earlier tests left in the heap would hide the peak
    before, peak = anonymous_bytes(), 0

    def watched(make):
        def call(*arguments, **more):
            nonlocal peak
            result = make(*arguments, **more)
            peak = max(peak, anonymous_bytes() - before)
            return result

        return call

    monkeypatch.setattr(files, "safe_open", watched(files.safe_open))
    monkeypatch.setattr(files, "save_file", watched(files.save_file))
    target = LlamaConfig(num_hidden_layers=48, **sizes | {"intermediate_size": 1364})
    out = remap_folder(
        tmp_path / "small", target, depth="interpolate", width="zero", out=tmp_path / "large", shard_bytes=8 * 2**20
    )
    written = sum(path.stat().st_size for path in out.glob("*.safetensors"))
    assert written > 250e6
    assert 0 < peak < 30e6


def test_nothing_is_overwritten_and_nothing_half_written(tmp_path, monkeypatch):
    saved(config_of("bert"), tmp_path / "small")
    (tmp_path / "taken").mkdir()
    with pytest.raises(UserError, match="exists already"):
        remap_folder(tmp_path / "small", config_of("bert"), out=tmp_path / "taken")
    with pytest.raises(UserError, match="choose repeat-last"):
        remap_folder(tmp_path / "small", config_of("bert", 3), out=tmp_path / "new")

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(files, "save_file", full)
    with pytest.raises(MachineError, match=r"new could not be written: No space left"):
        remap_folder(tmp_path / "small", config_of("bert"), out=tmp_path / "new")

    def failed(*_, **__):
        raise SafetensorError("I/O error")

    monkeypatch.setattr(files, "save_file", failed)
    with pytest.raises(MachineError, match=r"new could not be written: I/O error"):
        remap_folder(tmp_path / "small", config_of("bert"), out=tmp_path / "new")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["small", "taken"]


def test_sources_that_are_no_model(tmp_path):
    saved(config_of("bert"), tmp_path / "small")
    weights = tmp_path / "small" / "model.safetensors"
    whole = weights.read_bytes()
    cases = [
        (tmp_path / "nowhere", config_of("bert"), r"nowhere: no such file"),
        (tmp_path / "small", {"model_type": "t5"}, r"'t5' is not described; choose one of bert, roberta"),
        (tmp_path / "small", {"model_type": "llama", "hidden_size": 9, "num_attention_heads": 2}, r"not valid: .*9"),
    ]
    for folder, target, message in cases:
        with pytest.raises(UserError, match=message):
            remap_folder(folder, target, out=tmp_path / "out")
    weights.write_bytes(whole[:-100])
    with pytest.raises(UserError, match=r"model.safetensors: not a complete safetensors file"):
        initial_state(tmp_path / "small", config_of("bert"))
    weights.unlink()
    with pytest.raises(UserError, match=r"no model.safetensors; load the model and save it"):
        initial_state(tmp_path / "small", config_of("bert"))
    index = {"weight_map": {"bert.embeddings.word_embeddings.weight": "model-00002-of-00002.safetensors"}}
    (tmp_path / "small" / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(UserError, match=r"the index names model-00002-of-00002.safetensors, which is not there"):
        initial_state(tmp_path / "small", config_of("bert"))
    (tmp_path / "small" / "config.json").write_text("{")
    with pytest.raises(UserError, match=r"config.json: not a JSON configuration"):
        initial_state(tmp_path / "small", config_of("bert"))


def test_a_folder_that_is_not_there_is_said_before_the_libraries_are_loaded(tmp_path):
    """Loading them takes seconds."""
    (tmp_path / "config.json").write_text("{}")
    script = (
        "import sys\n"
        "from codistill.cli.make import remap\n"
        "from codistill.errors import UserError\n"
        "from pathlib import Path\n"
        "source, to, out = map(Path, sys.argv[1:])\n"
        "try:\n"
        "    remap(source, to=to, out=out)\n"
        "except UserError as error:\n"
        "    print(error)\n"
        "assert not {'torch', 'transformers'} & set(sys.modules)\n"
    )
    here, nowhere = str(tmp_path), str(tmp_path / "nowhere")
    for paths in ((here, nowhere), (nowhere, here)):
        call = [sys.executable, "-c", script, *paths, str(tmp_path / "out")]
        said = subprocess.run(call, capture_output=True, text=True, check=False)
        assert said.returncode == 0, said.stderr
        assert said.stdout.startswith(f"{nowhere}: no such file; wanted a folder")
