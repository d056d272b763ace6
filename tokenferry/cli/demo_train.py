"""Training for the demo: on the ranks through tokenferry, and by a dense twin in a single process."""

from __future__ import annotations

import math
import sys
import time
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from torch import nn

from tokenferry.buffer import Buffer
from tokenferry.cli.demo_model import Corpus, DenseMoE, LanguageModel, Settings, summed_loss
from tokenferry.nn import ExpertParallelMoE

TOLERANCE = 1e-4
"""Relative; for the losses and gradient norms of the ranks and of their twin. Both compute in float32 and sum in
different orders, which shows in the seventh digit; the rest is for a token whose second and third expert are so
close that rounding decides between them."""

_PROMPT = "The "
_TEMPERATURE = 0.7
_MAX_NORM = 1.0


@dataclass
class Trace:
    """What can be compared: one entry a step."""

    losses: list[float] = field(default_factory=list)
    """Mean cross entropy over the global batch, nats a character."""
    norms: list[float] = field(default_factory=list)
    """Norm of the gradient of all parameters, before clipping."""

    def agrees(self, other: Trace) -> bool:
        """Whether the steps that both have are within :data:`TOLERANCE`."""
        pairs = [*zip(self.losses, other.losses, strict=False), *zip(self.norms, other.norms, strict=False)]
        return all(math.isclose(one, two, rel_tol=TOLERANCE) for one, two in pairs)


@dataclass
class Report:
    """What a rank tells when training has ended. Plain values: they travel through a pipe."""

    trace: Trace
    agreed: bool
    """Whether the trace agrees with the twin's. If not, training ended there."""
    validation: list[tuple[int, float]] = field(default_factory=list)
    """(steps done, loss)."""
    expert_load: list[list[int]] = field(default_factory=list)
    """For each step, (token, choice) pairs for each local expert, layer after layer."""
    tokens_sent: list[int] = field(default_factory=list)
    """Tokens dispatched to each rank by the training steps."""
    seconds: float = 0.0
    """Of the training steps, without validation."""
    sample: str = ""


def train_dense(settings: Settings, corpus: Corpus, steps: int) -> Trace:
    """Run the first steps on the global batch in this process, in plain PyTorch."""
    model = LanguageModel(settings, len(corpus.characters), lambda seed: DenseMoE(settings, seed))
    optimiser = _optimiser(model)
    trace = Trace()
    for step in range(steps):
        sequences = corpus.batch(step)
        loss = summed_loss(model, sequences) / sequences[:, 1:].numel()
        model.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        norm = nn.utils.clip_grad_norm_(model.parameters(), _MAX_NORM)
        _step(optimiser, settings.learning_rate_at(step))
        trace.losses.append(loss.item())
        trace.norms.append(norm.item())
    return trace


def train(rank: int, num_ranks: int, settings: Settings, twin: Trace) -> Report:
    """Train on the ranks of the group; module-level, for :class:`tokenferry.cli.ranks.RankPool`.

    Args:
        rank: of this process.
        num_ranks: of the group.
        settings: of the demo.
        twin: what the first steps must come out as.

    Returns:
        The report of this rank; ``trace``, ``agreed`` and ``validation`` are the same on all ranks.
    """
    corpus = Corpus(settings)
    with Buffer(dist.group.WORLD, device="cpu") as buffer:
        model = LanguageModel(settings, len(corpus.characters), lambda seed: make_layer(buffer, settings, seed))
        return _Trainer(model, rank, num_ranks, settings, corpus).run(twin)


def make_layer(buffer: Buffer, settings: Settings, seed: int) -> ExpertParallelMoE:
    """The MoE layer of the ranks' model."""
    return ExpertParallelMoE(
        buffer, settings.hidden, settings.intermediate, settings.experts, settings.topk, seed=seed
    )


class _Trainer:
    def __init__(self, model: LanguageModel, rank: int, num_ranks: int, settings: Settings, corpus: Corpus) -> None:
        self.model, self.rank, self.num_ranks = model, rank, num_ranks
        self.settings, self.corpus = settings, corpus
        self.layers = [module for module in model.modules() if isinstance(module, ExpertParallelMoE)]
        self.experts = [parameter for layer in self.layers for parameter in layer.expert_parameters()]
        local = {id(parameter) for parameter in self.experts}
        self.replicated = [parameter for parameter in model.parameters() if id(parameter) not in local]
        self.optimiser = _optimiser(model)

    def run(self, twin: Trace) -> Report:
        from tqdm import tqdm

        settings = self.settings
        report = Report(Trace(), agreed=True, tokens_sent=[0] * self.num_ranks)
        # Closer together in the beginning, where the curve is steep.
        due = {settings.steps * i**2 // settings.validations**2 for i in range(settings.validations)}
        with tqdm(total=settings.steps, unit="step", disable=self.rank != 0, mininterval=0.5) as bar:
            for step in range(settings.steps):
                if step in due:
                    report.validation.append((step, self.validate()))
                began = time.perf_counter()
                loss, norm = self.step(step)
                report.seconds += time.perf_counter() - began
                report.trace.losses.append(loss)
                report.trace.norms.append(norm)
                report.expert_load.append([n for layer in self.layers for n in layer.expert_load.tolist()])
                for layer in self.layers:
                    sent = zip(report.tokens_sent, layer.tokens_sent.tolist(), strict=True)
                    report.tokens_sent = [total + tokens for total, tokens in sent]
                tokens = settings.batch * settings.length * (step + 1)
                bar.set_postfix_str(f"loss {loss:.3f}, {tokens / report.seconds:,.0f} tokens/s", refresh=False)
                bar.update()
                if step + 1 == len(twin.losses):
                    report.agreed = report.trace.agrees(twin)
                    if self.rank == 0:
                        bar.write(compared(report.trace, twin))
                        sys.stdout.flush()
                    if not report.agreed:
                        return report
        report.validation.append((settings.steps, self.validate()))
        report.sample = self.sample()
        return report

    def mine(self, sequences: torch.Tensor) -> torch.Tensor:
        """This rank's part of a global batch; none where there are more ranks than sequences."""
        return sequences.tensor_split(self.num_ranks)[self.rank]

    def step(self, step: int) -> tuple[float, float]:
        """One step of the optimiser: loss and gradient norm of the global batch."""
        sequences = self.corpus.batch(step)
        # Dividing by the tokens of the *global* batch makes every gradient a plain sum over the ranks: autograd and
        # tokenferry have summed those of the experts already, the replicated ones are summed below.
        loss = summed_loss(self.model, self.mine(sequences)) / sequences[:, 1:].numel()
        self.model.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        square = torch.stack([_gradient(parameter).square().sum() for parameter in self.experts]).sum()
        gradients = [_gradient(parameter) for parameter in self.replicated]
        packed = torch.cat([*(gradient.flatten() for gradient in gradients), loss.detach().view(1), square.view(1)])
        dist.all_reduce(packed)
        summed, loss, square = packed[:-2], packed[-2], packed[-1]
        norm = (summed.square().sum() + square).sqrt()
        sizes = [gradient.numel() for gradient in gradients]
        for gradient, total in zip(gradients, torch.split(summed, sizes), strict=True):
            gradient.copy_(total.view_as(gradient))
        scale = (_MAX_NORM / (norm + 1e-6)).clamp(max=1.0)
        for parameter in self.model.parameters():
            _gradient(parameter).mul_(scale)
        _step(self.optimiser, self.settings.learning_rate_at(step))
        return loss.item(), norm.item()

    @torch.no_grad()
    def validate(self) -> float:
        """Mean loss over the validation windows, nats a character."""
        windows = self.corpus.validation
        total = summed_loss(self.model, self.mine(windows))
        dist.all_reduce(total)
        return total.item() / windows[:, 1:].numel()

    @torch.no_grad()
    def sample(self) -> str:
        """Text that the model writes: for rank 0; the others lend their experts and bring no tokens."""
        prompt = self.corpus.encode(_PROMPT)[None]
        text = prompt if self.rank == 0 else prompt[:0]
        generator = torch.Generator().manual_seed(self.settings.seed)
        for _ in range(self.settings.sample_length):
            logits = self.model(text[:, -self.settings.length :])[:, -1]
            probabilities = torch.softmax(logits / _TEMPERATURE, dim=-1)
            chosen = torch.multinomial(probabilities, 1, generator=generator) if self.rank == 0 else text[:, :1]
            text = torch.cat((text, chosen), dim=1)
        return self.corpus.decode(text[0]) if self.rank == 0 else ""


def compared(ranks: Trace, twin: Trace) -> str:
    """The table of both traces side by side."""
    lines = [
        "",
        "The same steps through tokenferry and in a dense single-process twin:",
        f"{'step':>6}{'loss':>12}{'twin':>12}{'gradient norm':>18}{'twin':>12}{'difference':>14}",
    ]
    for step, (loss, norm, twin_loss, twin_norm) in enumerate(
        zip(ranks.losses, ranks.norms, twin.losses, twin.norms, strict=False), start=1
    ):
        difference = max(abs(loss / twin_loss - 1), abs(norm / twin_norm - 1))
        lines.append(f"{step:>6}{loss:>12.6f}{twin_loss:>12.6f}{norm:>18.6f}{twin_norm:>12.6f}{difference:>14.1e}")
    verdict = "agree" if ranks.agrees(twin) else "DO NOT agree"
    lines.append(f"They {verdict} within a relative {TOLERANCE:.0e}.\n")
    return "\n".join(lines)


def _optimiser(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), betas=(0.9, 0.99), weight_decay=0.01)


def _step(optimiser: torch.optim.Optimizer, learning_rate: float) -> None:
    for group in optimiser.param_groups:
        group["lr"] = learning_rate
    optimiser.step()


def _gradient(parameter: nn.Parameter) -> torch.Tensor:
    assert parameter.grad is not None
    return parameter.grad
