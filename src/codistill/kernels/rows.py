"""From a chunk's logits to its row losses and gradients, in PyTorch, a block of rows at a time.

A block bounds what is held beside the logits, and stays near the cache between one operation and the next. With p the
student's and t the teacher's softmax at temperature τ, ℓ their logarithms, and c the row's weight ÷ the denominator ×
the edge's weight, the gradient at the student's logits is (docs/loss.md)

    cross-entropy   c (p − y)                    forward KL       c τ (p − t)
    reverse KL      c τ p (ℓp − ℓt − KL(p ‖ t))  Jensen–Shannon   c τ/2 p (ℓp − ℓm − KL(p ‖ m)),  m = (p + t) / 2
    squared error   2 c (z − z_teacher) / V

Sums of divergences are taken in Bregman's form, Σ[a (ln a − ln b) − a + b], to which a rounded logsumexp does nothing
in first order. Shape suffixes: C rows of a chunk, R rows of a block, V vocabulary, M members, E edges.
"""

import math

import torch
from torch import Tensor

from codistill.kernels.head import GivenHead, Head
from codistill.kernels.problem import Edge, Problem

Softmax = tuple[Tensor, Tensor]  # (ℓ, exp ℓ), each (R, V)


def sweep(problem: Problem, heads: dict[str, Head | GivenHead], logits: dict[str, Tensor], rows: slice):
    """As `codistill.kernels.chunked.Sweep` says."""
    labels_C, scale_C = problem.labels_N[rows], problem.scale_N[rows]
    hard_MC = scale_C.new_empty(len(heads), len(labels_C))
    soft_EC = scale_C.new_empty(len(problem.edges), len(labels_C))
    at_label = {member: torch.empty_like(scale_C) for member, head in heads.items() if head.trained}
    gradients = {member: heads[member].gradient(len(labels_C)) for member in at_label}
    block_rows = rows_per_block(problem.vocabulary, scale_C.device.type)
    block = _Block(problem, heads, min(block_rows, len(labels_C)))
    for start in range(0, len(labels_C), block_rows):
        part = slice(start, start + block_rows)
        block.load({member: z_CV[part] for member, z_CV in logits.items()}, labels_C[part], scale_C[part])
        for index, member in enumerate(heads):
            hard_MC[index, part] = block.cross_entropy(member)
        for index, edge in enumerate(problem.edges):
            soft_EC[index, part] = block.divergence(edge)
        for member, gradient_CV in gradients.items():
            at_label[member][part] = block.store(member, gradient_CV[part])
    return hard_MC, soft_EC, at_label


def rows_per_block(vocabulary: int, device: str) -> int:
    """Rows of one block: about 8 MB of logits on a CPU, and 64 MB for a launch elsewhere.

    Blocks of 1 MB are no faster on a quiet CPU, and four times slower on a busy one: at the end of every operation the
    threads wait for one another, and smaller blocks are more operations.
    """
    elements = 2**21 if device == "cpu" else 2**24
    return max(1, elements // vocabulary)


def scratch_bytes(rows: int, vocabulary: int, softmaxes: int, trained: int, edges: int, device: str) -> int:
    """What a sweep holds beside the logits, in float32. Compiled, it needs the gradients alone under forward KL:
    `softmaxes` and `edges` are then 0."""
    block = min(rows_per_block(vocabulary, device), rows)
    return 4 * block * vocabulary * (2 * softmaxes + trained + (3 if edges else 0))


class _Block:
    """Scratch for one block of rows: every softmax that is needed, and the gradients while they add up."""

    def __init__(self, problem: Problem, heads: dict[str, Head | GivenHead], rows: int):
        self.problem, self.heads = problem, heads
        wanted = [(member, 1.0) for member in heads]
        soft = [edge for edge in problem.edges if edge.divergence != "squared_error"]
        wanted += [(member, edge.temperature) for edge in soft for member in (edge.student, edge.teacher)]
        empty = lambda: problem.scale_N.new_empty(rows, problem.vocabulary)  # noqa: E731
        self.scratch = {key: (empty(), empty()) for key in dict.fromkeys(wanted)}
        self.gradient_scratch = {member: empty() for member, head in heads.items() if head.trained}
        self.work_scratch = [empty() for _ in range(3 if problem.edges else 0)]

    def load(self, logits: dict[str, Tensor], labels_R: Tensor, scale_R: Tensor) -> None:
        """Take the block's logits, add the biases in place, and compute the softmaxes."""
        rows = len(labels_R)
        self.labels_R1, self.scale_R1 = labels_R[:, None], scale_R[:, None]
        self.softmax = {key: (log_p[:rows], p[:rows]) for key, (log_p, p) in self.scratch.items()}
        self.gradient = {member: tensor[:rows] for member, tensor in self.gradient_scratch.items()}
        self.work, self.logits = [tensor[:rows] for tensor in self.work_scratch], logits
        for member, z_RV in logits.items():
            bias_V = self.heads[member].bias_V
            if bias_V is not None:
                z_RV += bias_V
        for (member, temperature), (log_p_RV, p_RV) in self.softmax.items():
            z_RV = logits[member] if temperature == 1 else torch.div(logits[member], temperature, out=p_RV)
            torch.log_softmax(z_RV, -1, out=log_p_RV)
            torch.exp(log_p_RV, out=p_RV)

    def cross_entropy(self, member: str) -> Tensor:
        """Row losses (R,); starts the member's gradient."""
        log_p_RV, p_RV = self.softmax[member, 1.0]
        if member in self.gradient:
            torch.mul(p_RV, self.scale_R1 * self.problem.hard_weight[member], out=self.gradient[member])
        return -log_p_RV.gather(1, self.labels_R1)[:, 0]

    def divergence(self, edge: Edge) -> Tensor:
        """Row losses (R,), τ² included; adds to the student's gradient."""
        if edge.divergence == "squared_error":
            return self._squared_error(edge)
        student, teacher = (self.softmax[member, edge.temperature] for member in (edge.student, edge.teacher))
        rate_R1 = self.scale_R1 * edge.weight * edge.temperature
        of = {"forward_kl": _forward_kl, "reverse_kl": _reverse_kl, "jensen_shannon": _jensen_shannon}
        loss_R = of[str(edge.divergence)](student, teacher, self.gradient.get(edge.student), rate_R1, self.work)
        return loss_R * edge.temperature**2

    def _squared_error(self, edge: Edge) -> Tensor:
        change_RV = torch.sub(self.logits[edge.student], self.logits[edge.teacher], out=self.work[0])
        loss_R = torch.square(change_RV, out=self.work[1]).mean(-1)
        if edge.student in self.gradient:
            rate_R1 = self.scale_R1 * edge.weight * (2 / self.problem.vocabulary)
            self.gradient[edge.student].add_(change_RV.mul_(rate_R1))
        return loss_R

    def store(self, member: str, out_RV: Tensor) -> Tensor:
        """Write the finished gradient; the entries at the labels are set to 0 there and returned (R,).

        A label's entry, p − 1, is the one that cancels, and rounding it to bfloat16 together with the rest would lose
        the difference that a confident model learns from.
        """
        gradient_RV = self.gradient[member]
        at_label_R1 = gradient_RV.gather(1, self.labels_R1)
        at_label_R1 -= self.scale_R1 * self.problem.hard_weight[member]
        gradient_RV.scatter_(1, self.labels_R1, 0.0)
        out_RV.copy_(gradient_RV)
        return at_label_R1[:, 0]


def _forward_kl(student: Softmax, teacher: Softmax, gradient: Tensor | None, rate_R1: Tensor, work: list[Tensor]):
    (log_p, p), (log_t, t) = student, teacher
    change = torch.sub(p, t, out=work[0])
    terms = torch.sub(log_t, log_p, out=work[1])
    loss_R = terms.mul_(t).add_(change).sum(-1)
    if gradient is not None:
        gradient.add_(change.mul_(rate_R1))
    return loss_R


def _reverse_kl(student: Softmax, teacher: Softmax, gradient: Tensor | None, rate_R1: Tensor, work: list[Tensor]):
    (log_p, p), (log_t, t) = student, teacher
    terms = torch.sub(log_p, log_t, out=work[0]).mul_(p)
    loss_R = torch.sub(terms, p, out=work[1]).add_(t).sum(-1)
    if gradient is not None:
        gradient.add_(terms.sub_(torch.mul(p, loss_R[:, None], out=work[1])).mul_(rate_R1))
    return loss_R


def _jensen_shannon(student: Softmax, teacher: Softmax, gradient: Tensor | None, rate_R1: Tensor, work: list[Tensor]):
    (log_p, p), (log_t, t) = student, teacher
    log_m = torch.logaddexp(log_p, log_t, out=work[0]).sub_(math.log(2))
    m = torch.exp(log_m, out=work[1])
    terms = torch.sub(log_t, log_m, out=work[2]).mul_(t)
    from_teacher_R = terms.sub_(t).add_(m).sum(-1)
    terms = torch.sub(log_p, log_m, out=work[2]).mul_(p)
    from_student_R = m.add_(terms).sub_(p).sum(-1)
    if gradient is not None:
        terms.sub_(torch.mul(p, from_student_R[:, None], out=work[0]))
        gradient.add_(terms.mul_(rate_R1 / 2))
    return (from_student_R + from_teacher_R) / 2
