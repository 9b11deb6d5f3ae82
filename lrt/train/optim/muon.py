"""Muon on stacks of equal matrices, whole or sharded by rows, with the same result.

Letters: N matrices of one shape (R rows, C columns), W ranks that share the rows, r rows on this rank,
n = ceil(N / W) matrices that one rank orthogonalizes.

Source: Jordan et al. 2024 (Muon); Amsel et al. 2025, arXiv 2505.16932 (Polar Express); Li et al. 2025,
arXiv 2510.05491 (NorMuon, the factored second moment); the reference's settings are in docs/method.md, section 5.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor, Shard

GPU_DTYPE = torch.bfloat16  # of directions on a GPU; elsewhere that of the gradients
Coefficients = Sequence[tuple[float, float, float]]
Direction = Callable[..., tuple[Tensor, Tensor]]

# Polar Express, five steps, safety factor 0.02, cushion 2 (arXiv 2505.16932, Algorithm 1).
POLAR_EXPRESS: Coefficients = (
    (8.156554524902461, -22.48329292557795, 15.878769915207462),
    (4.042929935166739, -2.808917465908714, 0.5000178451051316),
    (3.8916678022926607, -2.772484153217685, 0.5060648178503393),
    (3.285753657755655, -2.3681294933425376, 0.46449024233003106),
    (2.3465413258596377, -1.7097828382687081, 0.42323551169305323),
)


class Layout(NamedTuple):
    """How the rows of a matrix lie over the ranks."""

    group: dist.ProcessGroup
    world: int
    rank: int

    def rows(self, total: int) -> list[int]:
        """Rows on each rank: DTensor's Shard(0) rounds up, so the last ranks may hold fewer or none."""
        step = -(-total // self.world)
        return [max(0, min(step, total - i * step)) for i in range(self.world)]


def layout_of(parameter: Tensor) -> Layout | None:
    """The row layout of a parameter; None when it is whole on this rank.

    Raises:
        ValueError: the parameter is sharded otherwise than by rows over one mesh dimension.
    """
    if not isinstance(parameter, DTensor):
        return None
    sharded = [(dim, placement) for dim, placement in enumerate(parameter.placements) if placement.is_shard()]
    if len(sharded) > 1 or any(placement != Shard(0) for _, placement in sharded):
        raise ValueError(
            f"optimizer: placements {parameter.placements} are not supported: "
            "shard parameters by rows over one mesh dimension"
        )
    if not sharded:
        return None
    dim = sharded[0][0]
    mesh = parameter.device_mesh
    if mesh.size(dim) == 1:
        return None
    return Layout(mesh.get_group(dim), mesh.size(dim), mesh.get_local_rank(dim))


def local(tensor: Tensor) -> Tensor:
    """This rank's part of a parameter, gradient or state (a view)."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def gradient_of(parameter: Tensor) -> Tensor:
    """This rank's part of a gradient that is there."""
    assert parameter.grad is not None
    return local(parameter.grad)


# ------------------------------------------------------------------ the mathematics, on whole matrices


def orthogonalize(stack_NRC: Tensor, *, coefficients: Coefficients = POLAR_EXPRESS, safety: float = 1.02) -> Tensor:
    """The nearest semi-orthogonal matrix of each matrix, approximately, in the stack's dtype.

    Args:
        stack_NRC: matrices.
        coefficients: (a, b, c) of each step X <- a X + (b A + c A A) X with A = X X^T.
        safety: the Frobenius norm is divided by this much more than itself, so that no singular value passes 1.
    """
    tall = stack_NRC.size(-2) > stack_NRC.size(-1)
    x = stack_NRC.mT if tall else stack_NRC
    x = x / (x.norm(dim=(-2, -1), keepdim=True) * safety + 1e-6)
    for a, b, c in coefficients:
        gram = x @ x.mT
        x = a * x + (b * gram + c * (gram @ gram)) @ x
    return x.mT if tall else x


def direction(stack_NRC: Tensor, second_moment: Tensor, *, rate: Tensor) -> tuple[Tensor, Tensor]:
    """Orthogonalized matrices with their rows (or columns) scaled to even sizes, total norm unchanged.

    Args:
        stack_NRC: momentum-averaged gradients, in the dtype of the computation.
        second_moment: (N, R, 1) or (N, 1, C), running mean square of each row or column, float32.
        rate: 0-D, 1 - beta of the running mean; 0 leaves it as it is.

    Returns:
        The update in the stack's dtype, and the new second moment.
    """
    update = orthogonalize(stack_NRC)
    dim = -1 if second_moment.size(-1) == 1 else -2
    square = update.float().square().mean(dim=dim, keepdim=True)
    second_moment = second_moment.lerp(square, rate)
    scale = second_moment.clamp_min(1e-10).rsqrt()
    before = square.sum(dim=(-2, -1), keepdim=True).sqrt()
    after = (square * scale.square()).sum(dim=(-2, -1), keepdim=True).sqrt()
    scale = scale * (before / after.clamp_min(1e-10))
    return update * scale.to(update.dtype), second_moment


def second_moment_like(parameter: Tensor) -> Tensor:
    """Zeros for the factored second moment: a number per row, or a column where those are fewer;
    whole on every rank."""
    rows, columns = parameter.shape
    shape = (rows, 1) if rows >= columns else (1, columns)
    return torch.zeros(shape, dtype=torch.float32, device=parameter.device)


# ------------------------------------------------------------------ number by number, on this rank's rows


def averages(
    gradients: Sequence[Tensor], momenta: Sequence[Tensor], *, momentum: Tensor, scale: Tensor, dtype: torch.dtype
) -> Tensor:
    """Update running means in place, and stack the Nesterov averages that follow from them.

    Args:
        gradients, momenta: N of one shape (r, C).
        momentum: 0-D, coefficient of the running mean.
        scale: 0-D, factor of the gradients; at 0 a mean takes the place of its gradient, and so stays exactly what it
            was.
        dtype: of the stack.

    Returns:
        (N, r, C).
    """
    stack = []
    for gradient, mean in zip(gradients, momenta):
        gradient = torch.where(scale > 0, gradient * scale, mean)  # NaN * 0 is NaN
        mean.copy_(gradient.lerp(mean, momentum))
        stack.append(gradient.lerp(mean, momentum).to(dtype))
    return torch.cat(stack).view(len(stack), *gradients[0].shape)


def apply_updates(masters: Sequence[Tensor], updates: Sequence[Tensor], *, lr: Tensor, weight_decay: Tensor) -> None:
    """Change masters in place, with a weight decay that acts only where it agrees with the update's sign.

    Args:
        masters, updates: N of one shape (r, C); updates in any dtype.
        lr, weight_decay: 0-D.
    """
    for master, update in zip(masters, updates):
        update = update.to(master.dtype)
        decay = weight_decay * (master * (update * master >= 0))
        master.sub_((update + decay) * lr)


class Parts(NamedTuple):
    """What a step runs on a stack: whole matrices in the middle, this rank's rows before and after."""

    averages: Callable[..., Tensor] = averages
    direction: Direction = direction
    apply_updates: Callable[..., None] = apply_updates

    def compiled(self) -> Parts:
        """The same in few kernels, made once a shape: numbers that change from step to step are tensors."""
        return Parts._make(torch.compile(part, fullgraph=True, dynamic=False) for part in self)


# ------------------------------------------------------------------ one step on one stack


def muon_step(
    params: Sequence[Tensor],
    momenta: Sequence[Tensor],
    second_moments: Sequence[Tensor],
    *,
    lr: float,
    momentum: float,
    beta2: float,
    weight_decay: float,
    finite: Tensor,
    scale: Tensor | None = None,
    parts: Parts = Parts(),
) -> None:
    """Update matrices of one shape in place, each orthogonalized whole by one rank.

    Args:
        params: N parameters of one shape (R, C), with gradients; all whole, or all sharded by rows alike.
        momenta: running means of the gradients, laid out as the parameters.
        second_moments: factored second moments, whole on every rank.
        lr: learning rate; times sqrt(max(1, R / C)) here.
        momentum: coefficient of the running mean, Nesterov style.
        beta2: coefficient of the second moment.
        weight_decay: cautious: it acts only where it agrees with the update's sign.
        finite: 0-D on the device, 1.0 = do the step, 0.0 = leave everything as it was.
        scale: 0-D on the device, factor of the gradients, above 0; None = 1.
        parts: the mathematics, eager or compiled.

    Departs: the reference computes lr and weight decay in bf16; here the masters see float32.
    """
    layout = layout_of(params[0])
    rows, columns = params[0].shape
    gradients = [gradient_of(p) for p in params]
    # The computation's dtype also travels between the ranks: the same rounding, half the bytes.
    dtype = GPU_DTYPE if finite.is_cuda else gradients[0].dtype
    scale = finite if scale is None else torch.where(finite.bool(), scale, 0.0)
    means = [local(m) for m in momenta]
    nesterov = parts.averages(gradients, means, momentum=torch.full_like(finite, momentum), scale=scale, dtype=dtype)

    moments = torch.stack(list(second_moments))
    rate = (1.0 - beta2) * finite
    update, moments = _on_owners(
        nesterov, moments, layout=layout, rows=rows, apply=lambda g, m: parts.direction(g, m, rate=rate)
    )
    torch._foreach_copy_(list(second_moments), list(moments.unbind()))

    lr = lr * max(1.0, rows / columns) ** 0.5
    masters = [local(p) for p in params]
    parts.apply_updates(masters, update.unbind(), lr=lr * finite, weight_decay=torch.full_like(finite, weight_decay))


def _on_owners(
    stack_NrC: Tensor,
    moments: Tensor,
    *,
    layout: Layout | None,
    rows: int,
    apply: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]],
) -> tuple[Tensor, Tensor]:
    """``apply`` to whole matrices: each rank gathers its share of the stack, computes, and scatters it back."""
    if layout is None:
        return apply(stack_NrC, moments)
    count, _, columns = stack_NrC.shape
    share = -(-count // layout.world)
    row_counts = layout.rows(rows)
    mine = row_counts[layout.rank]

    def padded(tensor: Tensor) -> Tensor:  # zero matrices fill up the last share, so that every rank runs one shape
        return torch.cat([tensor, tensor.new_zeros(share * layout.world - count, *tensor.shape[1:])])

    here, there = [share * mine * columns] * layout.world, [share * r * columns for r in row_counts]
    received = stack_NrC.new_empty(sum(there))
    dist.all_to_all_single(
        received, padded(stack_NrC).flatten(), output_split_sizes=there, input_split_sizes=here, group=layout.group
    )
    whole = torch.cat([part.view(share, r, columns) for part, r in zip(received.split(there), row_counts)], dim=1)

    own = slice(layout.rank * share, (layout.rank + 1) * share)
    update, new_moments = apply(whole, padded(moments)[own])

    back = stack_NrC.new_empty(share * layout.world * mine * columns)
    pieces = torch.cat([part.flatten() for part in update.split(row_counts, dim=1)])
    dist.all_to_all_single(back, pieces, output_split_sizes=here, input_split_sizes=there, group=layout.group)
    gathered = new_moments.new_empty(share * layout.world, *new_moments.shape[1:])
    dist.all_gather(list(gathered.chunk(layout.world)), new_moments.contiguous(), group=layout.group)
    return back.view(share * layout.world, mine, columns)[:count], gathered[:count]
