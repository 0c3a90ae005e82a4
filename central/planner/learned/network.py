"""The two-stage policy: attention over trees by gather, so that its cost grows linearly with the number of machines.

Per block (VMR2L, NSDI 24, section 3.4, made sparse in fact):
    tree      every PM and its VMs attend to each other: keys and values are gathered per PM, (M, 1 + L) tokens
    cluster   a few learned tokens read all PMs, and every PM reads them: the way across the cluster, linear in M
    forward   a small network on every token
Heads: a score per VM; for the chosen VM a score per place from the tokens of the VM and of the place's PM and the
place's own features; the value of the state. Weights do not depend on the numbers of VMs, PMs or places.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from central.planner.learned.observe import PLACE_FEATURES, PM_FEATURES, VM_FEATURES, Observation

MASKED = -1e9


@dataclass(frozen=True)
class Batch:
    """B observations as tensors, padded to the largest."""

    vm: Tensor  # (B, V, VM_FEATURES)
    pm: Tensor  # (B, M, PM_FEATURES)
    tree: Tensor  # (B, M, 1 + L) token numbers: the PM itself (V + m), then its VMs; 0 where padded
    tree_mask: Tensor  # (B, M, 1 + L) True where there is a token
    slot: Tensor  # (B, V + M) where in the flattened tree each token is
    vm_mask: Tensor  # (B, V)


def batch_of(observations: Sequence[Observation]) -> Batch:
    """Stack observations; those with fewer VMs, PMs or members are padded, and padding is masked."""
    vms = max(len(one.vm) for one in observations)
    pms = max(len(one.pm) for one in observations)
    width = 1 + max(one.members.shape[1] for one in observations)
    count = len(observations)
    vm = np.zeros((count, vms, VM_FEATURES), dtype=np.float32)
    pm = np.zeros((count, pms, PM_FEATURES), dtype=np.float32)
    tree = np.zeros((count, pms, width), dtype=np.int64)
    tree_mask = np.zeros((count, pms, width), dtype=np.bool_)
    slot = np.zeros((count, vms + pms), dtype=np.int64)
    vm_mask = np.zeros((count, vms), dtype=np.bool_)
    for row, one in enumerate(observations):
        v, m = len(one.vm), len(one.pm)
        vm[row, :v], pm[row, :m], vm_mask[row, :v] = one.vm, one.pm, one.vm_mask
        tree[row, :m, 0] = vms + np.arange(m)
        tree_mask[row, :m, 0] = True
        held = one.members >= 0
        tree[row, :m, 1 : 1 + one.members.shape[1]] = np.where(held, one.members, 0)
        tree_mask[row, :m, 1 : 1 + one.members.shape[1]] = held
        at = np.arange(pms * width).reshape(pms, width)
        slot[row, tree[row][tree_mask[row]]] = at[tree_mask[row]]
    return Batch(*(torch.from_numpy(part) for part in (vm, pm, tree, tree_mask, slot, vm_mask)))


def rows(tokens: Tensor, index: Tensor) -> Tensor:
    """Tokens (B, N, d) at index (B, ...) -> (B, ..., d)."""
    flat = index.reshape(index.shape[0], -1)
    picked = torch.gather(tokens, 1, flat[..., None].expand(-1, -1, tokens.shape[-1]))
    return picked.reshape(*index.shape, tokens.shape[-1])


class TreeAttention(nn.Module):
    """Attention among a PM and its VMs, all PMs at once."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.into = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)

    def forward(self, tokens: Tensor, batch: Batch) -> Tensor:
        """Tokens (B, V + M, d) -> the same shape."""
        count, pms, leaves = batch.tree.shape
        gathered = rows(self.into(tokens), batch.tree).view(count * pms, leaves, 3, self.heads, -1)
        query, key, value = gathered.permute(2, 0, 3, 1, 4)
        mask = batch.tree_mask.view(count * pms, 1, 1, leaves)
        # A padded PM has no leaf at all; letting it see its padding keeps the softmax finite, and nobody reads it.
        mask = mask | ~mask.any(dim=-1, keepdim=True)
        mixed = functional.scaled_dot_product_attention(query, key, value, attn_mask=mask)
        flat = mixed.transpose(1, 2).reshape(count, pms * leaves, -1)
        return self.out(rows(flat, batch.slot))  # type: ignore[no-any-return]


class CrossAttention(nn.Module):
    """Tokens read other tokens."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.query, self.both, self.out = nn.Linear(width, width), nn.Linear(width, 2 * width), nn.Linear(width, width)

    def forward(self, readers: Tensor, read: Tensor, mask: Tensor | None) -> Tensor:
        """Readers (B, R, d), read (B, N, d), mask broadcastable to (B, heads, R, N) -> (B, R, d)."""
        count, length, width = readers.shape
        query = self.query(readers).view(count, length, self.heads, -1).transpose(1, 2)
        key, value = self.both(read).view(count, read.shape[1], 2, self.heads, -1).permute(2, 0, 3, 1, 4)
        mixed = functional.scaled_dot_product_attention(query, key, value, attn_mask=mask)
        return self.out(mixed.transpose(1, 2).reshape(count, length, width))  # type: ignore[no-any-return]


class ClusterAttention(nn.Module):
    """PMs to a few learned tokens and back."""

    def __init__(self, width: int, heads: int, latents: int) -> None:
        super().__init__()
        self.latents = nn.Parameter(torch.randn(latents, width) / width**0.5)
        self.read = CrossAttention(width, heads)
        self.write = CrossAttention(width, heads)

    def forward(self, pms: Tensor, absent: Tensor) -> tuple[Tensor, Tensor]:
        """PMs (B, M, d), absent (B, M) -> what each PM reads (B, M, d), the learned tokens (B, latents, d)."""
        start = self.latents.expand(len(pms), -1, -1)
        summary = start + self.read(start, pms, ~absent[:, None, None])
        return self.write(pms, summary, None), summary


class Block(nn.Module):
    """Tree attention, cluster attention, feed-forward; each normalised before and added."""

    def __init__(self, width: int, heads: int, latents: int) -> None:
        super().__init__()
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(3))
        self.tree = TreeAttention(width, heads)
        self.cluster = ClusterAttention(width, heads, latents)
        self.forward_net = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))

    def forward(self, tokens: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
        """Tokens (B, V + M, d) -> tokens, learned tokens."""
        vms = batch.vm.shape[1]
        tokens = tokens + self.tree(self.norms[0](tokens), batch)
        read, summary = self.cluster(self.norms[1](tokens[:, vms:]), ~batch.tree_mask[..., 0])
        tokens = torch.cat([tokens[:, :vms], tokens[:, vms:] + read], dim=1)
        return tokens + self.forward_net(self.norms[2](tokens)), summary


class Policy(nn.Module):
    """VM scores, place scores and the state's value."""

    def __init__(self, width: int = 32, heads: int = 2, blocks: int = 2, latents: int = 8) -> None:
        super().__init__()
        self.sizes = {"width": width, "heads": heads, "blocks": blocks, "latents": latents}
        self.vm_in = nn.Sequential(nn.Linear(VM_FEATURES, width), nn.GELU(), nn.Linear(width, width))
        self.pm_in = nn.Sequential(nn.Linear(PM_FEATURES, width), nn.GELU(), nn.Linear(width, width))
        self.blocks = nn.ModuleList(Block(width, heads, latents) for _ in range(blocks))
        self.vm_out = nn.Sequential(nn.Linear(width + VM_FEATURES, width), nn.GELU(), nn.Linear(width, 1))
        self.of_vm, self.of_pm = nn.Linear(width + VM_FEATURES, width), nn.Linear(width, width)
        self.of_place, self.place_out = nn.Linear(PLACE_FEATURES, width), nn.Linear(width, 1)
        self.place_mix = nn.Linear(width, width)
        self.value_out = nn.Sequential(nn.Linear(width, width), nn.GELU(), nn.Linear(width, 1))

    def forward(self, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
        """Masked VM scores (B, V), tokens (B, V + M, d) for the second stage, values (B,)."""
        vms = batch.vm.shape[1]
        tokens = torch.cat([self.vm_in(batch.vm), self.pm_in(batch.pm)], dim=1)
        summary = tokens[:, :1]
        for block in self.blocks:
            tokens, summary = block(tokens, batch)
        scores = self.vm_out(torch.cat([tokens[:, :vms], batch.vm], dim=-1))[..., 0]
        return scores.masked_fill(~batch.vm_mask, MASKED), tokens, self.value_out(summary.mean(dim=1))[..., 0]

    def place_scores(
        self, batch: Batch, tokens: Tensor, vm: Tensor, pm: Tensor, features: Tensor, legal: Tensor
    ) -> Tensor:
        """Masked scores (B, K) of places: chosen vm (B,), each place's PM (B, K), features (B, K, F), legal (B, K)."""
        one = torch.arange(len(vm))
        chosen = self.of_vm(torch.cat([tokens[one, vm], batch.vm[one, vm]], dim=-1))
        hosts = rows(self.of_pm(tokens[:, batch.vm.shape[1] :]), pm)
        mixed = functional.gelu(chosen[:, None] + hosts + self.of_place(features))
        scores = self.place_out(functional.gelu(self.place_mix(mixed)))[..., 0]
        return scores.masked_fill(~legal, MASKED)  # type: ignore[no-any-return]
