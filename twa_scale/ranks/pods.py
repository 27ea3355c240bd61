"""Pods: shard groups that see different data and exchange numbers, never weights or gradients."""

from typing import TypeVar

import torch

from twa_scale.errors import EngineError
from twa_scale.ranks.group import Group

T = TypeVar("T")


class Pods(Group):
    """All ranks of all pods, pod by pod. What goes from pod to pod goes once: their first ranks speak for them.

    So pods may differ in size, and every rank gets the same bits: the sum over pods is formed in one group only.
    """

    def __init__(self, pod: Group, replicas: Group) -> None:
        """Find the other pods. Collective.

        Args:
            pod: the shard group of this rank.
            replicas: a group with one rank of every pod. That of the first ranks is used; other ranks may give theirs,
                or one that they are not in (`dist.GroupMember.NON_GROUP_MEMBER`).

        Raises:
            EngineError: replicas that are not one rank of each pod.
        """
        outside = replicas.size < 1
        known = Group.alone() if outside else replicas
        places = known.gather((pod.rank, pod.size))
        with known.agree(), pod.agree():
            if outside and pod.rank == 0:
                raise EngineError(_MISPLACED + f", and lacks the first rank of a pod of {pod.size}.")
            if any(rank != pod.rank for rank, _ in places):
                raise EngineError(_MISPLACED + f"; it holds ranks {[rank for rank, _ in places]} of their pods.")
        self._pod = pod
        self._leaders = known
        sizes, self.number = pod.broadcast(([size for _, size in places], known.rank))
        self.count = len(sizes)
        self.size = sum(sizes)
        self.rank = sum(sizes[: self.number]) + pod.rank
        self.share = pod.size / self.size
        """This pod's part of all ranks: what its mean weighs in the mean of all."""

    @property
    def name(self) -> str:
        """What messages call this rank: with its pod, where there are several."""
        name = (self._pod if self._pod.size > 1 else self._leaders).name
        return f"{name} (pod {self.number})" if self.count > 1 else name

    def sum_(self, tensor: torch.Tensor) -> torch.Tensor:
        """SUM `tensor` over all ranks, in place; every rank ends with the same bits."""
        self._pod.sum_(tensor)
        if self.count > 1:
            if self._pod.rank == 0:
                self._leaders.sum_(tensor)
            self._pod.copy_from(0, tensor)
        return tensor

    def gather(self, value: T) -> list[T]:
        """Return every rank's `value`, by rank, on every rank. For small objects."""
        values = self._pod.gather(value)
        if self.count == 1:
            return values
        if self._pod.rank == 0:
            values = [one for part in self._leaders.gather(values) for one in part]
        return self._pod.broadcast(values)

    def broadcast(self, value: T, source: int = 0) -> T:
        """Return the `value` of rank `source` on every rank. For small objects."""
        if source == 0:
            return self._pod.broadcast(self._leaders.broadcast(value) if self._pod.rank == 0 else value)
        return self.gather(value if self.rank == source else None)[source]  # type: ignore[return-value]

    def all_gather(self, out: torch.Tensor, local: torch.Tensor) -> None:
        """Refuse: large tensors stay inside a pod."""
        raise NotImplementedError


_MISPLACED = "replica_group: it must hold the first rank of every pod, or this rank's counterpart in each"
