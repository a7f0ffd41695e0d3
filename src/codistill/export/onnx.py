"""Models to ONNX files, and what is checked and measured of such a file.

Shape suffixes: B sequences, T position, V vocabulary, N predicted rows.
"""

import logging
import shutil
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from codistill.config import Run
from codistill.data.tokenizers import load_tokenizer, vocabulary_size
from codistill.errors import MachineError, UserError
from codistill.families import longest
from codistill.loading import load, read_run
from codistill.models import load_model
from codistill.objectives import Batch
from codistill.texts import corpus_of, held_out_of

TOLERANCE = 1e-4  # by which an ONNX logit may differ from PyTorch's
_INLINE_BYTES = 1 << 30  # a protobuf holds two gigabytes; larger models keep their weights in a file beside it
_SEQUENCES_AT_ONCE = 16


class _Logits(nn.Module):
    """The model as ONNX has it: two inputs (B, T) int64 in, logits (B, T, V) out."""

    def __init__(self, model: PreTrainedModel):
        super().__init__()
        self.model = model
        self.options = {"use_cache": False} if getattr(model.config, "use_cache", None) is not None else {}

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        return self.model(input_ids=input_ids, attention_mask=attention_mask, **self.options).logits


def convert(source: Path, fresh: Path) -> dict[str, Any]:
    """Writes model.onnx, tokenizer and configuration; returns how far its logits are from PyTorch's."""
    shutil.copytree(source, fresh, dirs_exist_ok=True, ignore=shutil.ignore_patterns("*.safetensors*"))
    model = load_model(str(source), "--member")
    logits = _Logits(model).eval()
    shapes = _shapes(model)
    with _quietly():
        torch.onnx.export(
            logits,
            _inputs(model, *shapes[0]),
            str(fresh / "model.onnx"),
            dynamo=True,
            input_names=["input_ids", "attention_mask"],
            output_names=["logits"],
            dynamic_shapes={name: {0: "batch", 1: "length"} for name in ("input_ids", "attention_mask")},
            external_data=sum(p.nbytes for p in model.parameters()) > _INLINE_BYTES,
            verbose=False,
        )
    return check_parity(logits, fresh / "model.onnx", shapes)


def quantise(float32: Path, int8: Path) -> None:
    from onnxruntime.quantization import QuantType, quantize_dynamic

    with _quietly():
        external = float32.stat().st_size < size(float32.parent, float32.name)
        quantize_dynamic(float32, int8, weight_type=QuantType.QInt8, use_external_data_format=external)


# ---- what is checked and measured --------------------------------------------------------------


def _shapes(model: PreTrainedModel) -> list[tuple[int, int]]:
    """Two shapes (B, T); the second is longer than a local attention window, and has another batch."""
    return [(2, 9), (3, min(200, longest(model) or 200))]


def _inputs(model: PreTrainedModel, sequences: int, length: int) -> tuple[Tensor, Tensor]:
    """Random ids (B, T) and their mask, in which the last third of the last sequence is padding."""
    draw = torch.Generator().manual_seed(length)
    ids_BT = torch.randint(model.config.vocab_size, (sequences, length), generator=draw)
    mask_BT = torch.ones_like(ids_BT)
    mask_BT[-1, length * 2 // 3 :] = 0
    return ids_BT, mask_BT


@torch.no_grad()
def check_parity(logits: _Logits, file: Path, shapes: Sequence[tuple[int, int]]) -> dict[str, Any]:
    """The largest difference of a logit at a token that is no padding; MachineError where it is over 1e-4."""
    session, differences = _session(file), []
    for shape in shapes:
        ids_BT, mask_BT = _inputs(logits.model, *shape)
        ours_BTV, theirs_BTV = logits(ids_BT, mask_BT).numpy(), _run(session, ids_BT, mask_BT)
        # What stands at padding has no meaning: a row of attention with nothing to attend to is up to the library.
        differences.append(np.abs(ours_BTV - theirs_BTV)[mask_BT.numpy() == 1].max())
    worst = float(np.max(differences))  # not Python's max, which takes NaN for small
    if not worst <= TOLERANCE:
        raise MachineError(
            f"the ONNX file's logits differ from PyTorch's by {worst:.1e}, more than {TOLERANCE:.0e}, so it was not "
            "kept; try other versions of torch and onnxruntime"
        )
    return {"largest_difference": worst, "tolerance": TOLERANCE, "shapes": [list(shape) for shape in shapes]}


def compare(folder: Path, source: Path, files: Mapping[str, Path]) -> dict[str, Any]:
    """Loss (nats) and top-1 accuracy of each file on the run's held-out text, or why there are none."""
    run, tokenizer = load(read_run(folder / "run.yaml")), load_tokenizer(str(source))
    try:
        batches = _held_out(run, tokenizer)
    except UserError as error:
        return {"not_measured": str(error)}
    scores = {name: _scores(_session(file), batches, vocabulary_size(tokenizer)) for name, file in files.items()}
    one, other = scores["float32"], scores["int8"]
    drops = {"accuracy_drop": one.accuracy - other.accuracy, "loss_rise": other.loss - one.loss}
    return {name: score._asdict() for name, score in scores.items()} | drops


def _held_out(run: Run, tokenizer: Any) -> list[Batch]:
    """The rows that the run was scored on; UserError where the text is not there or not the same any more.

    Attention crosses documents in them, whatever the run did: a file knows no other.
    """
    corpus = corpus_of(run.data, "validation", tokenizer)
    recorded = (run.provenance or {}).get("data", {}).get("validation", {}).get("identity")
    if recorded not in (None, corpus.manifest["identity"]):
        raise UserError("data.validation: the text is not what the run was scored on")
    return held_out_of(run, corpus, within_documents=False, sequences=_SEQUENCES_AT_ONCE)


class _Score(NamedTuple):
    accuracy: float
    loss: float
    rows: int


def _scores(session: Any, batches: Sequence[Batch], vocabulary: int) -> _Score:
    right = loss = rows = 0.0
    for batch in batches:
        ids_BT = batch.inputs["input_ids"]
        mask_BT = batch.inputs.get("attention_mask", torch.ones_like(ids_BT))  # there where rows are padded
        logits_BTV = torch.from_numpy(_run(session, ids_BT, mask_BT))
        logits_NV = logits_BTV.flatten(0, 1)[batch.rows_N, :vocabulary]
        losses_N = nn.functional.cross_entropy(logits_NV, batch.labels_N, reduction="none")
        weight_N = batch.weight_N
        loss += float(losses_N.double() @ weight_N.double())
        right += float((logits_NV.argmax(-1) == batch.labels_N).double() @ weight_N.double())
        rows += float(weight_N.sum())
    return _Score(right / rows, loss / rows, round(rows))


def _session(file: Path) -> Any:
    import onnxruntime

    return onnxruntime.InferenceSession(str(file), providers=["CPUExecutionProvider"])


def _run(session: Any, ids_BT: Tensor, mask_BT: Tensor) -> np.ndarray:
    return session.run(None, {"input_ids": ids_BT.numpy(), "attention_mask": mask_BT.numpy()})[0]


def size(folder: Path, name: str) -> int:
    """Bytes of a file and of the weights beside it."""
    return sum(file.stat().st_size for file in folder.glob(f"{name}*"))


@contextmanager
def _quietly() -> Iterator[None]:
    """Without what the exporter says of libraries that nobody needs here."""
    before = logging.root.manager.disable
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        logging.disable(logging.WARNING)
        try:
            yield
        finally:
            logging.disable(before)
