"""The two-stage policy: attention over trees by gather, so that its cost grows linearly with the number of machines.

    local    each PM and its VMs attend to each other, tree by tree: (trees, 1 + L) tokens and no other pair at all
    cluster  a few learned tokens read all PMs and every PM reads them: the way across the cluster, linear in PMs
    heads    a score per VM from its token, its PM's token and its features; for the chosen VM a score per place from
             the tokens of the VM and of the place's PM and the place's features; the value of the state
VMR2L's blocks (NSDI 24, section 3.4) do tree, PM-PM and VM-VM attention in turn behind a dense mask. Here the local
part comes first and depends on a PM's own tree alone. So after a move only the two PMs it touched are encoded anew.
Weights do not depend on the numbers of VMs, PMs or places.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from central.planner.learned.observe import (
    LOCAL_FEATURES,
    PLACE_FEATURES,
    PM_FEATURES,
    PROGRESS_FEATURES,
    VM_FEATURES,
    Observation,
)

MASKED = -1e9


@dataclass(frozen=True)
class Batch:
    """B observations as tensors, padded to the largest; B x M trees."""

    vm: Tensor  # (B, V, VM_FEATURES)
    pm: Tensor  # (B, M, PM_FEATURES)
    host: Tensor  # (B, V) PM of each VM, -1 where there is none or no VM
    vm_mask: Tensor  # (B, V)
    pm_mask: Tensor  # (B, M) False where padded
    progress: Tensor  # (B, PROGRESS_FEATURES)


def batch_of(observations: Sequence[Observation]) -> Batch:
    """Stack observations; padding is masked."""
    count = len(observations)
    vms, pms = max(len(one.vm) for one in observations), max(len(one.pm) for one in observations)
    vm = np.zeros((count, vms, VM_FEATURES), dtype=np.float32)
    pm = np.zeros((count, pms, PM_FEATURES), dtype=np.float32)
    host = np.full((count, vms), -1, dtype=np.int64)
    vm_mask, pm_mask = np.zeros((count, vms), dtype=np.bool_), np.zeros((count, pms), dtype=np.bool_)
    for row, one in enumerate(observations):
        v, m = len(one.vm), len(one.pm)
        vm[row, :v], pm[row, :m], host[row, :v], vm_mask[row, :v] = one.vm, one.pm, one.host, one.vm_mask
        pm_mask[row, :m] = True
    progress = np.stack([one.progress for one in observations])
    return Batch(*(torch.from_numpy(part) for part in (vm, pm, host, vm_mask, pm_mask, progress)))


def rows(tokens: Tensor, index: Tensor) -> Tensor:
    """Tokens (B, N, d) at index (B, K) -> (B, K, d)."""
    return torch.gather(tokens, 1, index[..., None].expand(-1, -1, tokens.shape[-1]))


class Attention(nn.Module):
    """Tokens read tokens."""

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


class Local(nn.Module):
    """One round inside each tree: attention, then a small network on every token."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.before, self.between = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attention = Attention(width, heads)
        self.net = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))

    def forward(self, tokens: Tensor, mask: Tensor) -> Tensor:
        """Tokens (trees, 1 + L, d), mask (trees, 1 + L) -> the same shape."""
        normal = self.before(tokens)
        tokens = tokens + self.attention(normal, normal, mask[:, None, None])
        return tokens + self.net(self.between(tokens))  # type: ignore[no-any-return]


class Across(nn.Module):
    """One round across the cluster: learned tokens read the PMs, the PMs read them."""

    def __init__(self, width: int, heads: int, latents: int) -> None:
        super().__init__()
        self.before, self.between = nn.LayerNorm(width), nn.LayerNorm(width)
        self.latents = nn.Parameter(torch.randn(latents, width) / width**0.5)
        self.read, self.write = Attention(width, heads), Attention(width, heads)
        self.net = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))

    def forward(self, pms: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """PMs (B, M, d), mask (B, M) -> PMs, the learned tokens (B, latents, d)."""
        start = self.latents.expand(len(pms), -1, -1)
        normal = self.before(pms)
        summary = start + self.read(start, normal, mask[:, None, None])
        pms = pms + self.write(normal, summary, None)
        return pms + self.net(self.between(pms)), summary


class Policy(nn.Module):
    """VM scores, place scores and the state's value."""

    def __init__(self, width: int = 32, heads: int = 2, blocks: int = 2, latents: int = 8) -> None:
        super().__init__()
        self.sizes = {"width": width, "heads": heads, "blocks": blocks, "latents": latents}
        self.vm_in = nn.Sequential(nn.Linear(LOCAL_FEATURES, width), nn.GELU(), nn.Linear(width, width))
        self.pm_in = nn.Sequential(nn.Linear(PM_FEATURES, width), nn.GELU(), nn.Linear(width, width))
        self.progress_in = nn.Linear(PROGRESS_FEATURES, width)
        self.local = nn.ModuleList(Local(width, heads) for _ in range(blocks))
        self.across = nn.ModuleList(Across(width, heads, latents) for _ in range(blocks))
        # The VM head is one layer on (token, PM's token, features), written as a sum: each part where it is cheapest.
        self.score_token, self.score_host = nn.Linear(width, width), nn.Linear(width, width)
        self.score_features, self.score_out = nn.Linear(VM_FEATURES, width), nn.Linear(width, 1)
        self.of_vm, self.of_pm = nn.Linear(width + VM_FEATURES, width), nn.Linear(width, width)
        self.of_place, self.place_out = nn.Linear(PLACE_FEATURES, width), nn.Linear(width, 1)
        self.place_mix = nn.Linear(width, width)
        self.value_out = nn.Sequential(nn.Linear(width, width), nn.GELU(), nn.Linear(width, 1))

    def encode(self, vm: Tensor, pm: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """Trees alone: VMs (T, L, >= LOCAL_FEATURES), PMs (T, PM_FEATURES), mask (T, L) -> tokens (T, L, d), (T, d)."""
        tokens = torch.cat([self.pm_in(pm)[:, None], self.vm_in(vm[..., :LOCAL_FEATURES])], dim=1)
        everyone = torch.cat([torch.ones_like(mask[:, :1]), mask], dim=1)
        for block in self.local:
            tokens = block(tokens, everyone)
        return tokens[:, 1:], tokens[:, 0]

    def encode_all(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """All trees of a batch -> VM tokens (B, V, d), PM tokens (B, M, d)."""
        count, vms = batch.host.shape
        pms = batch.pm.shape[1]
        placed = (batch.host >= 0).reshape(-1).nonzero()[:, 0]
        tree = (batch.host + pms * torch.arange(count)[:, None]).reshape(-1)[placed]
        order = torch.argsort(tree, stable=True)
        sizes = torch.bincount(tree, minlength=count * pms)
        rank = torch.arange(len(tree)) - (torch.cumsum(sizes, 0) - sizes)[tree[order]]
        leaves = max(1, int(sizes.max()))
        slot = torch.empty_like(order)
        slot[order] = tree[order] * leaves + rank
        padded = batch.vm.new_zeros(count * pms * leaves, LOCAL_FEATURES)
        padded[slot] = batch.vm.reshape(count * vms, -1)[placed, :LOCAL_FEATURES]
        mask = torch.zeros(count * pms * leaves, dtype=torch.bool)
        mask[slot] = True
        tokens, hosts = self.encode(
            padded.view(-1, leaves, LOCAL_FEATURES), batch.pm.view(count * pms, -1), mask.view(-1, leaves)
        )
        width = tokens.shape[-1]
        of_vm = tokens.new_zeros(count * vms, width).index_copy(0, placed, tokens.reshape(-1, width)[slot])
        return of_vm.view(count, vms, width), hosts.view(count, pms, width)

    def score(self, batch: Batch, vm_tokens: Tensor, pm_tokens: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Masked VM scores (B, V), PM tokens after the rounds across the cluster (B, M, d), values (B,)."""
        pms = pm_tokens + self.progress_in(batch.progress)[:, None]
        summary = pms[:, :1]
        for block in self.across:
            pms, summary = block(pms, batch.pm_mask)
        mixed = (
            self.score_token(vm_tokens)
            + rows(self.score_host(pms), batch.host.clamp(min=0))
            + self.score_features(batch.vm)
        )
        scores = self.score_out(functional.gelu(mixed))[..., 0].masked_fill(~batch.vm_mask, MASKED)
        # The head's value is per PM, so that it does not grow with the cluster.
        return scores, pms, self.value_out(summary.mean(dim=1))[..., 0] * batch.pm_mask.sum(dim=1) / 8

    def place_scores(
        self, batch: Batch, vm_tokens: Tensor, pms: Tensor, vm: Tensor, pm: Tensor, features: Tensor, legal: Tensor
    ) -> Tensor:
        """Masked scores (B, K) of places: chosen vm (B,), each place's PM (B, K), features (B, K, F), legal (B, K)."""
        one = torch.arange(len(vm))
        chosen = self.of_vm(torch.cat([vm_tokens[one, vm], batch.vm[one, vm]], dim=-1))
        mixed = functional.gelu(chosen[:, None] + rows(self.of_pm(pms), pm) + self.of_place(features))
        scores = self.place_out(functional.gelu(self.place_mix(mixed)))[..., 0]
        return scores.masked_fill(~legal, MASKED)  # type: ignore[no-any-return]
