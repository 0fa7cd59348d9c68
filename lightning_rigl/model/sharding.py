"""What several processes do together: the full tensor of a shard and back, and whether all agree.

The only file that imports torch.distributed. In one process every function here is the identity.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.distributed as dist
from torch import Tensor

if dist.is_available():
    from torch.distributed.tensor import DTensor, Replicate


def is_sharded(tensor: Tensor) -> bool:
    """Whether the tensor is spread over processes (FSDP2, tensor parallel)."""
    return dist.is_available() and isinstance(tensor, DTensor)


def local(tensor: Tensor) -> Tensor:
    """What this process holds of a tensor, sharing its memory."""
    return tensor.to_local() if dist.is_available() and isinstance(tensor, DTensor) else tensor


def full(tensor: Tensor) -> Tensor:
    """The whole tensor, in every process; of a sharded one, all processes must ask together."""
    return tensor.full_tensor() if dist.is_available() and isinstance(tensor, DTensor) else tensor


def shard(tensor: Tensor, like: Tensor) -> Tensor:
    """A whole tensor, equal in every process, spread as ``like`` is. Sends nothing."""
    if not dist.is_available() or not isinstance(like, DTensor):
        return tensor
    mesh = like.device_mesh
    whole = DTensor.from_local(tensor, mesh, [Replicate()] * mesh.ndim, run_check=False)
    return whole.redistribute(placements=like.placements)


def together() -> bool:
    """Whether several processes train one model."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def everywhere(flag: bool, device: torch.device) -> bool:
    """Whether the flag is true in every process; one small collective."""
    if not together():
        return flag
    result = torch.tensor(int(flag), device=device)
    dist.all_reduce(result, op=dist.ReduceOp.MIN)
    return bool(result)


def check_same(numbers: Mapping[str, int], device: torch.device) -> None:
    """Raise RuntimeError if the processes have other numbers (of 62 bits, one for each layer)."""
    if not numbers or not together() or _same(hash(tuple(numbers.values())) >> 2, device):
        return
    every: list[dict[str, int]] = [{}] * dist.get_world_size()
    dist.all_gather_object(every, dict(numbers))  # processes may not even have the same layers
    known = dict.fromkeys(name for each in every for name in each)
    names = [name for name in known if len({each.get(name) for each in every}) > 1]
    raise RuntimeError(
        f"the processes of this run have different masks in {', '.join(names[:5])}: their seeds, their "
        "checkpoints, or the gradients that chose the connections differ; give all the same seed= and "
        "checkpoint, and let DistributedDataParallel average the gradients before the step"
    )


def _same(number: int, device: torch.device) -> bool:
    extremes = torch.tensor([number, -number], device=device)
    dist.all_reduce(extremes, op=dist.ReduceOp.MAX)
    largest, smallest = extremes.tolist()
    return bool(largest == -smallest)


def total(number: int, device: torch.device) -> int:
    """The sum of a number of any size over the processes, exact; one small collective."""
    if not together():
        return number
    limbs = torch.tensor([(number >> shift) & 0x7FFFFFFF for shift in range(0, 186, 31)], device=device)
    dist.all_reduce(limbs)
    return sum(limb << shift for limb, shift in zip(limbs.tolist(), range(0, 186, 31), strict=True))


def mean(tensor: Tensor) -> Tensor:
    """The average over the processes, the same in all of them; one collective of the tensor's size."""
    if not together():
        return tensor
    result = tensor.clone(memory_format=torch.contiguous_format)
    dist.all_reduce(result)  # gloo cannot average
    return result / dist.get_world_size()
