"""Pods: shard groups that see different data and exchange only coefficient gradients and small objects."""

from typing import TypeVar

import torch

from twa_scale.errors import EngineError
from twa_scale.ranks.group import Group
from twa_scale.ranks.ranks import Ranks

T = TypeVar("T")


class Pods(Ranks):
    """All ranks of all pods, ordered by pod. Only the first ranks of the pods communicate between pods.

    Pods may therefore differ in size, and every rank gets the same bits, because one group forms the sum over pods.
    """

    def __init__(self, pod: Group, replicas: Group) -> None:
        """Exchange the sizes of all pods. Collective.

        Args:
            pod: the shard group of this rank.
            replicas: a group with one rank of every pod. Only the group of the first ranks is used. Other ranks may
                pass theirs, or a group that they are not in (`dist.GroupMember.NON_GROUP_MEMBER`).

        Raises:
            EngineError: `replicas` does not hold the counterpart of this rank in every pod.
        """
        is_outside = replicas.size < 1
        known = Group.alone() if is_outside else replicas
        positions = known.gather((pod.rank, pod.size))
        with known.agree(), pod.agree():
            if is_outside and pod.rank == 0:
                raise EngineError(_MISPLACED + f", and lacks the first rank of a pod of {pod.size}.")
            if any(rank != pod.rank for rank, _ in positions):
                raise EngineError(_MISPLACED + f"; it holds ranks {[rank for rank, _ in positions]} of their pods.")
        self._pod = pod
        self._leaders = known
        sizes, self.number = pod.broadcast(([size for _, size in positions], known.rank))
        self.count = len(sizes)
        self.size = sum(sizes)
        self.rank = sum(sizes[: self.number]) + pod.rank
        self.share = pod.size / self.size
        """The number of this pod's ranks divided by that of all ranks: the weight of its mean in the mean of all."""

    @property
    def name(self) -> str:
        """The name of this rank for messages, with its pod if there are several."""
        name = (self._pod if self._pod.size > 1 else self._leaders).name
        return f"{name} (pod {self.number})" if self.count > 1 else name

    def sum_(self, tensor: torch.Tensor) -> torch.Tensor:
        """Sum `tensor` over all ranks in place; the result is bitwise equal on every rank."""
        self._pod.sum_(tensor)
        if self.count > 1:
            if self._pod.rank == 0:
                self._leaders.sum_(tensor)
            self._pod.copy_from(0, tensor)
        return tensor

    def gather(self, value: T) -> list[T]:
        """Return the `value` of every rank, ordered by rank. For small objects."""
        values = self._pod.gather(value)
        if self.count == 1:
            return values
        if self._pod.rank == 0:
            values = [value for of_pod in self._leaders.gather(values) for value in of_pod]
        return self._pod.broadcast(values)

    def broadcast(self, value: T, source: int = 0) -> T:
        """Return the `value` of rank `source` on every rank. For small objects."""
        if source == 0:
            return self._pod.broadcast(self._leaders.broadcast(value) if self._pod.rank == 0 else value)
        return self.gather(value if self.rank == source else None)[source]  # type: ignore[return-value]


_MISPLACED = "replica_group: it must hold the first rank of every pod, or this rank's counterpart in each"
