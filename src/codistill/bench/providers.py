"""Who computes the mutual loss in `codistill bench loss`: each provider turns one setting into a function to time.

The loss: two members, cross-entropy of each and forward KL both ways at temperature 1, teachers detached, no bias.
Shape suffixes: N predicted rows, A all rows, D width, V vocabulary.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import functional

from codistill.kernels import Edge, linear_cohort_loss
from codistill.kernels.chunked import rows_per_chunk
from codistill.kernels.head import Head, multiply, multiply_add

MEMBERS = ("a", "b")


@dataclass(frozen=True)
class Setting:
    """What is asked: float32 parameters of two members, and the type in which the products are to be made."""

    hidden: Mapping[str, Tensor]
    weight: Mapping[str, Tensor]
    labels_N: Tensor
    hard_weight: float = 1.0
    low: bool = False
    mask_rate: float = 0.3

    @property
    def device(self) -> str:
        return self.labels_N.device.type

    def cast(self, tensor: Tensor) -> Tensor:
        """The tensor as the products take it: bfloat16 training keeps float32 parameters and rounds a copy."""
        return tensor.to(torch.bfloat16) if self.low else tensor


Loss = Callable[[], Tensor | None]  # computes the loss; None: made no graph, nothing to differentiate


def random_setting(device: str, low: bool, rows: int, vocabulary: int, width: int, apart: float = 0.0) -> Setting:
    """Two members drawn apart, or with `apart` > 0 one and a copy whose features differ by so much."""
    generator = torch.Generator().manual_seed(0)
    draw = lambda *shape: torch.randn(*shape, generator=generator)  # noqa: E731
    hidden = {member: draw(rows, width) for member in MEMBERS}
    weight = {member: draw(vocabulary, width) * 1.5 / width**0.5 for member in MEMBERS}
    if apart:
        hidden["b"], weight["b"] = hidden["a"] + apart * hidden["b"], weight["a"].clone()
    round_ = lambda tensor: (tensor.bfloat16().float() if low else tensor).to(device).requires_grad_()  # noqa: E731
    labels_N = torch.randint(vocabulary, (rows,), generator=generator).to(device)
    return Setting(
        {m: round_(h) for m, h in hidden.items()}, {m: round_(w) for m, w in weight.items()}, labels_N, low=low
    )


def ours(impl: str) -> Callable[[Setting], Loss]:
    def provider(setting: Setting) -> Loss:
        hard_weight = dict.fromkeys(MEMBERS, setting.hard_weight)
        edges = [Edge("a", "b"), Edge("b", "a")]

        def loss() -> Tensor:
            with torch.autocast(setting.device, torch.bfloat16, enabled=setting.low):
                return linear_cohort_loss(
                    setting.hidden,
                    setting.weight,
                    {},
                    setting.labels_N,
                    hard_weight=hard_weight,
                    edges=edges,
                    impl=impl,
                ).total

        return loss

    return provider


def products(setting: Setting) -> Loss:
    """The six bare matrix products in our chunks: what no implementation that makes them can fall below."""
    rows = rows_per_chunk(setting.weight["a"].shape[0], setting.device)
    with torch.autocast(setting.device, torch.bfloat16, enabled=setting.low):
        wants, vocabulary = (False, False, False), setting.weight["a"].shape[0]
        heads = [Head(setting.hidden[m], setting.weight[m], None, vocabulary, rows, wants) for m in MEMBERS]
    d_weights = [torch.zeros_like(setting.weight[m]) for m in MEMBERS]
    d_x_CD = torch.empty(rows, setting.hidden["a"].shape[1], device=setting.device)

    def loss() -> None:
        for start in range(0, len(setting.labels_N), rows):
            for head, d_weight_VD in zip(heads, d_weights, strict=True):
                x_CD = head.hidden_ND[start : start + rows].to(head.operand)
                head.logits(slice(start, start + rows))
                g_CV = head.gradient(len(x_CD))
                with head.precision():
                    multiply(g_CV, head.operand_VD, d_x_CD[: len(x_CD)])
                    multiply_add(d_weight_VD, g_CV.T, x_CD)

    return loss


def plain(setting: Setting) -> Loss:
    """torch.nn.functional, logits of the predicted rows in the products' type, everything after in float32."""
    return lambda: _plain_loss(_plain_logits(setting), setting.labels_N, setting.hard_weight)


def plain_compiled(setting: Setting) -> Loss:
    compiled = torch.compile(_plain_loss)
    return lambda: compiled(_plain_logits(setting), setting.labels_N, setting.hard_weight)


def plain_all_rows(setting: Setting) -> Loss:
    """The same with logits of every position, of which `mask_rate` are predicted and the others masked out."""
    rows = round(len(setting.labels_N) / setting.mask_rate)
    labels_A = setting.labels_N.new_full((rows,), -100)
    labels_A[: len(setting.labels_N)] = setting.labels_N
    filler = torch.randn(rows - len(setting.labels_N), setting.hidden["a"].shape[1], device=setting.device)

    def loss() -> Tensor:
        everything = {member: torch.cat([hidden, filler]) for member, hidden in setting.hidden.items()}
        logits = _plain_logits(replace(setting, hidden=everything))
        return _plain_loss(logits, labels_A, setting.hard_weight)

    return loss


def torch_linear_cross_entropy(chunk_rows: int | None) -> Callable[[Setting], Loss]:
    """Both cross-entropies only, by torch.nn.functional.linear_cross_entropy: a floor, not the same loss."""

    def provider(setting: Setting) -> Loss:
        choose = torch.nn.LinearCrossEntropyOptions
        options = choose(batch_chunk_size=chunk_rows) if chunk_rows else choose()

        def one(member: str) -> Tensor:
            hidden, weight = setting.cast(setting.hidden[member]), setting.cast(setting.weight[member])
            return functional.linear_cross_entropy(hidden, weight, setting.labels_N, options=options)

        return lambda: one("a") + one("b")

    return provider


def liger_chunked(chunk_rows: int, compiled: bool) -> Callable[[Setting], Loss]:
    """liger-kernel's chunked distillation loss, once per direction; beta 0 is forward KL."""

    def provider(setting: Setting) -> Loss:
        from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss

        one_way = LigerFusedLinearJSDLoss(setting.hard_weight, 1.0, beta=0.0, compiled=compiled, chunk_size=chunk_rows)
        return lambda: _both_ways(setting, lambda s, t: one_way(*s, *(x.detach() for x in t), setting.labels_N))

    return provider


def liger_triton(setting: Setting) -> Loss:
    """liger-kernel's Triton kernels: divergence and cross-entropy, each once per direction."""
    from liger_kernel.transformers.fused_linear_cross_entropy import LigerFusedLinearCrossEntropyLoss
    from liger_kernel.transformers.fused_linear_jsd import LigerFusedLinearJSD

    _needs_cuda(setting)
    divergence, cross_entropy = LigerFusedLinearJSD(jsd_beta=0.0), LigerFusedLinearCrossEntropyLoss()

    def one_way(student: tuple[Tensor, Tensor], teacher: tuple[Tensor, Tensor]) -> Tensor:
        soft = divergence(*student, *(x.detach() for x in teacher), None)
        hidden, weight = student
        return soft + setting.hard_weight * cross_entropy(weight, hidden, setting.labels_N)

    return lambda: _both_ways(setting, one_way)


def flash_linear_attention(setting: Setting) -> Loss:
    """flash-linear-attention's fused KL and cross-entropy, each once per direction."""
    from fla.modules import FusedKLDivLoss, FusedLinearCrossEntropyLoss

    _needs_cuda(setting)
    divergence, cross_entropy = FusedKLDivLoss(), FusedLinearCrossEntropyLoss()

    def one_way(student: tuple[Tensor, Tensor], teacher: tuple[Tensor, Tensor]) -> Tensor:
        (hidden, weight), (teacher_hidden, teacher_weight) = student, (x.detach() for x in teacher)
        soft = divergence(hidden, teacher_hidden, weight, teacher_weight)
        return soft + setting.hard_weight * cross_entropy(hidden[None], setting.labels_N[None], weight)

    return lambda: _both_ways(setting, one_way)


def cut_cross_entropy(setting: Setting) -> Loss:
    """Both cross-entropies only, by cut-cross-entropy without its gradient filter."""
    from cut_cross_entropy import linear_cross_entropy

    _needs_cuda(setting)
    one = lambda h, w: linear_cross_entropy(h, w, setting.labels_N, filter_eps=None)  # noqa: E731
    return lambda: _both_ways(setting, lambda student, _: one(*student))


def quack(setting: Setting) -> Loss:
    """Both cross-entropies only, by quack-kernels."""
    from quack.linear_cross_entropy import chunked_linear_cross_entropy

    _needs_cuda(setting)
    return lambda: _both_ways(setting, lambda student, _: chunked_linear_cross_entropy(*student, setting.labels_N))


def _both_ways(setting: Setting, one_way: Callable[[tuple, tuple], Tensor]) -> Tensor:
    a, b = ((setting.cast(setting.hidden[m]), setting.cast(setting.weight[m])) for m in MEMBERS)
    return one_way(a, b) + one_way(b, a)


def _plain_logits(setting: Setting) -> list[Tensor]:
    linear = lambda m: functional.linear(setting.cast(setting.hidden[m]), setting.cast(setting.weight[m]))  # noqa: E731
    return [linear(member).float() for member in MEMBERS]


def _plain_loss(logits: list[Tensor], labels: Tensor, hard_weight: float) -> Tensor:
    log_p, log_q = (functional.log_softmax(z, -1) for z in logits)
    predicted = labels != -100
    soft = logits[0].new_zeros(())
    for student, teacher in ((log_p, log_q), (log_q, log_p)):
        rows = functional.kl_div(student, teacher.detach(), log_target=True, reduction="none").sum(-1)
        soft = soft + (rows * predicted).sum() / predicted.sum()
    hard = functional.nll_loss(log_p, labels) + functional.nll_loss(log_q, labels)
    return hard_weight * hard + soft


def _needs_cuda(setting: Setting) -> None:
    if setting.device != "cuda":
        raise RuntimeError("needs a CUDA device")


@dataclass(frozen=True)
class Provider:
    """`cross_entropy_only`: a floor, compared with the gradient of that loss alone."""

    make: Callable[[Setting], Loss]
    package: str | None = None
    cross_entropy_only: bool = False


PROVIDERS: Mapping[str, Provider] = {
    "bare products": Provider(products),
    "ours, chunked": Provider(ours("chunked")),
    "ours, triton": Provider(ours("triton")),
    "ours, reference": Provider(ours("reference")),
    "plain": Provider(plain),
    "plain, compiled": Provider(plain_compiled),
    "plain, all rows": Provider(plain_all_rows),
    "liger chunked": Provider(liger_chunked(1024, compiled=True), "liger-kernel"),
    "liger chunked, 4096": Provider(liger_chunked(4096, compiled=True), "liger-kernel"),
    "liger chunked, eager": Provider(liger_chunked(1024, compiled=False), "liger-kernel"),
    "liger triton": Provider(liger_triton, "liger-kernel"),
    "flash-linear-attention": Provider(flash_linear_attention, "flash-linear-attention"),
    "torch, hard only": Provider(torch_linear_cross_entropy(None), cross_entropy_only=True),
    "torch, hard only, 512": Provider(torch_linear_cross_entropy(512), cross_entropy_only=True),
    "cut-cross-entropy, hard only": Provider(cut_cross_entropy, "cut-cross-entropy", cross_entropy_only=True),
    "quack, hard only": Provider(quack, "quack-kernels", cross_entropy_only=True),
}
