"""What the demo trains: Python's own help texts, and a small transformer with Mixture-of-Experts layers.

Legend of dims: B sequences, S positions, V characters of the vocabulary, T = B * S tokens, H hidden, E experts.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from tokenferry.nn.moe import initial_expert, initial_router


class Settings(NamedTuple):
    """The size of the demo. The batch is global: ranks share it, and results do not depend on how many they are."""

    steps: int = 200
    seed: int = 0
    batch: int = 16
    """Sequences a step, over all ranks."""
    length: int = 128
    """Characters a sequence."""
    hidden: int = 96
    intermediate: int = 128
    layers: int = 2
    heads: int = 4
    experts: int = 8
    topk: int = 2
    learning_rate: float = 6e-3
    warmup: int = 20
    """Steps."""
    window: int = 4
    """Characters that are embedded at each position: its own and those right before it."""
    checked_steps: int = 8
    """Steps that the dense twin runs too."""
    validations: int = 12
    """How many times the validation loss is measured on the way."""
    sample_length: int = 200
    """Characters to generate in the end."""

    def learning_rate_at(self, step: int) -> float:
        """Linear warm-up, then a cosine down to a tenth."""
        if step < self.warmup:
            return self.learning_rate * (step + 1) / self.warmup
        done = (step - self.warmup) / max(1, self.steps - self.warmup)
        return self.learning_rate * (0.55 + 0.45 * math.cos(math.pi * done))


class Corpus:
    """The texts behind Python's ``help()``, as character ids; every tenth topic is kept for validation."""

    def __init__(self, settings: Settings) -> None:
        from pydoc_data.topics import topics

        texts = [topics[name] for name in sorted(topics)]
        characters = sorted(set("".join(texts)))
        self._id_of = {character: i for i, character in enumerate(characters)}
        self.characters = characters
        self.train = self.encode("\n\n".join(text for i, text in enumerate(texts) if i % 10))
        held_out = self.encode("\n\n".join(texts[::10]))
        windows = held_out.unfold(0, settings.length + 1, settings.length)
        picked = torch.linspace(0, windows.size(0) - 1, min(settings.batch, windows.size(0))).long()
        self.validation = windows[picked]
        """int64 [B, S + 1]: windows spread evenly over the held-out topics."""
        self._settings = settings

    def encode(self, text: str) -> torch.Tensor:
        """int64 [characters]."""
        return torch.tensor([self._id_of[character] for character in text])

    def decode(self, ids: torch.Tensor) -> str:
        """The text of character ids."""
        return "".join(self.characters[i] for i in ids.tolist())

    def batch(self, step: int) -> torch.Tensor:
        """int64 [B, S + 1], a function of the seed and the step: the global batch."""
        settings = self._settings
        generator = torch.Generator().manual_seed((settings.seed << 32) + step)
        starts = torch.randint(self.train.numel() - settings.length, (settings.batch,), generator=generator)
        return self.train[starts[:, None] + torch.arange(settings.length + 1)]

    def unigram_loss(self) -> float:
        """Validation loss, in nats a character, of a model that knows how frequent each character is."""
        counts = torch.bincount(self.train, minlength=len(self.characters)).double() + 1
        return -float((counts / counts.sum()).log()[self.validation[:, 1:]].mean())

    def bigram_loss(self) -> float:
        """Validation loss, in nats a character, of a model that looks one character back."""
        size = len(self.characters)
        pairs = torch.bincount(self.train[:-1] * size + self.train[1:], minlength=size * size).double() + 0.1
        table = pairs.view(size, size)
        logs = (table / table.sum(1, keepdim=True)).log()
        return -float(logs[self.validation[:, :-1], self.validation[:, 1:]].mean())


class DenseMoE(nn.Module):
    """The layer of the twin: all experts in one process, each evaluated on every token. Nothing is sent."""

    def __init__(self, settings: Settings, seed: int) -> None:
        super().__init__()
        hidden, experts = settings.hidden, settings.experts
        drawn = [initial_expert(seed, expert, hidden, settings.intermediate) for expert in range(experts)]
        gate, up, down = (torch.stack(weights) for weights in zip(*drawn, strict=True))
        self.num_topk = settings.topk
        self.router = nn.Parameter(initial_router(seed, experts, hidden))
        self.gate, self.up, self.down = nn.Parameter(gate), nn.Parameter(up), nn.Parameter(down)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[B, S, H] to the same."""
        probabilities = torch.softmax(x @ self.router.T, dim=-1)
        best, ids = probabilities.topk(self.num_topk, dim=-1)
        share = torch.zeros_like(probabilities).scatter(-1, ids, best / best.sum(-1, keepdim=True))
        out = torch.zeros_like(x)
        for expert, (gate, up, down) in enumerate(zip(self.gate, self.up, self.down, strict=True)):
            out = out + share[..., expert, None] * ((F.silu(x @ gate.T) * (x @ up.T)) @ down.T)
        return out


class Block(nn.Module):
    """Causal attention, then the experts."""

    def __init__(self, settings: Settings, moe: nn.Module) -> None:
        super().__init__()
        self.heads = settings.heads
        self.attention_norm = nn.RMSNorm(settings.hidden)
        self.qkv = nn.Linear(settings.hidden, 3 * settings.hidden, bias=False)
        self.projection = nn.Linear(settings.hidden, settings.hidden, bias=False)
        self.moe_norm = nn.RMSNorm(settings.hidden)
        self.moe = moe

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[B, S, H] to the same."""
        qkv = self.qkv(self.attention_norm(x)).unflatten(-1, (3, self.heads, -1))
        query, key, value = (part.transpose(1, 2) for part in qkv.unbind(2))
        query, key = (_rotate(F.rms_norm(part, part.shape[-1:])) for part in (query, key))
        attended = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        x = x + self.projection(attended.transpose(1, 2).flatten(2))
        return x + torch.as_tensor(self.moe(self.moe_norm(x)))


def _rotate(x: torch.Tensor) -> torch.Tensor:
    """Rotary positions (arXiv:2104.09864) for [..., S, D]: pairs of columns turn with the position."""
    half = x.size(-1) // 2
    speeds = 10000.0 ** (-torch.arange(half) / half)
    angles = torch.arange(x.size(-2))[:, None] * speeds
    cos, sin = angles.cos(), angles.sin()
    first, second = x.chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, first * sin + second * cos), dim=-1)


class LanguageModel(nn.Module):
    """A decoder over characters. The same seed gives the same parameters, whatever the MoE layers are made of.

    Args:
        settings: sizes and seed.
        vocabulary: V.
        make_moe: makes the MoE layer [B, S, H] -> [B, S, H] for a seed.
    """

    def __init__(self, settings: Settings, vocabulary: int, make_moe: Callable[[int], nn.Module]) -> None:
        super().__init__()
        self.window = settings.window
        layers = [make_moe(settings.seed * settings.layers + layer) for layer in range(settings.layers)]
        with torch.random.fork_rng():
            torch.manual_seed(settings.seed)
            self.token = nn.Embedding(vocabulary, settings.window * settings.hidden)
            self.blocks = nn.ModuleList(Block(settings, moe) for moe in layers)
            self.norm = nn.RMSNorm(settings.hidden)
            self.head = nn.Linear(settings.hidden, vocabulary, bias=False)
            nn.init.normal_(self.token.weight, std=0.5)
            nn.init.normal_(self.head.weight, std=0.02)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """Logits [B, S, V] for int64 tokens [B, S]."""
        # A character has one vector for its own position and others for the positions right after it.
        parts = self.token(tokens).unflatten(-1, (self.window, -1)).unbind(2)
        later = [F.pad(part, (0, 0, back, 0))[:, : tokens.size(1)] for back, part in enumerate(parts)]
        x = torch.stack(later).sum(0)
        for block in self.blocks:
            x = block(x)
        return torch.as_tensor(self.head(self.norm(x)))


def summed_loss(model: nn.Module, sequences: torch.Tensor) -> torch.Tensor:
    """Cross entropy in nats, summed over the S predictions in each of int64 [B, S + 1]."""
    logits = model(sequences[:, :-1])
    return F.cross_entropy(logits.flatten(0, 1), sequences[:, 1:].flatten(), reduction="sum")
