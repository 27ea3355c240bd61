"""The fingerprint of candidates, with which a saved state is compared."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from twa_scale.base.names import nearest, quoted
from twa_scale.errors import CandidateError, StateError
from twa_scale.ranks import Pods, first_difference


@dataclass(frozen=True)
class Fingerprint:
    """The labels, tensor names and shapes of the candidates, and a checksum of each tensor."""

    labels: tuple[str, ...]
    shapes: dict[str, tuple[int, ...]]
    checksums: torch.Tensor
    """(n, tensors), int64; columns in the order of `shapes`. Additive over spans, so independent of the sharding."""

    def checksums_of(self, names: Collection[str]) -> list[list[int]]:
        """Return the checksums of these tensors, for each candidate."""
        columns = [column for column, name in enumerate(self.shapes) if name in names]
        result: list[list[int]] = self.checksums[:, columns].tolist()
        return result

    def require(self, saved: "Fingerprint") -> None:
        """Check that the candidates are those of a saved state.

        Raises:
            StateError: names the first candidate and tensor that differ.
        """
        if len(self.labels) != len(saved.labels):
            raise StateError(
                f"the state was trained on {len(saved.labels)} candidates ({saved.labels[0]} to {saved.labels[-1]}), "
                f"this run has {len(self.labels)}; give the same candidates in the same order."
            )
        for name, shape in saved.shapes.items():
            if self.shapes.get(name) != shape:
                raise StateError(
                    f"the state was trained on a tensor {name!r} of shape {shape}, the candidates now have "
                    f"{self.shapes.get(name, 'none')}{(name not in self.shapes and nearest(name, self.shapes)) or '.'}"
                )
        columns = {name: self.checksums[:, column].tolist() for column, name in enumerate(self.shapes)}
        saved.require_checksums(
            [{name: column[i] for name, column in columns.items()} for i in range(len(self.labels))], self.labels
        )

    def require_names(self, names: Collection[str], label: str) -> None:
        """Check that candidates have the tensor names of this fingerprint.

        Args:
            names: the names of their tensors.
            label: the label of one of them, for the message.

        Raises:
            StateError: names the missing and the new tensors.
        """
        missing, new = sorted(self.shapes.keys() - set(names)), sorted(set(names) - self.shapes.keys())
        if missing or new:
            differs = [f"lack {quoted(missing)}"] * bool(missing) + [
                f"hold {quoted(new)}, which it does not know"
            ] * bool(new)
            raise StateError(
                f"{label}: the candidates do not hold the tensors that the state was trained on: they "
                f"{' and '.join(differs)}. Restore the candidates of the run; if they have not changed, the state was "
                "written by another twa_scale: export with that one, or start a new run."
            )

    def require_checksums(self, checksums: Sequence[Mapping[str, int]], labels: Sequence[str] = ()) -> None:
        """Check that the checksums of tensors are those of this fingerprint.

        Args:
            checksums: the checksums by tensor name, for each candidate. Missing tensors are not compared.
            labels: the labels of the candidates, for messages; by default, those of the fingerprint.

        Raises:
            StateError: names the first candidate and tensor that differ.
        """
        for name, expected in zip(self.shapes, self.checksums.T.tolist(), strict=True):
            for i, sums in enumerate(checksums):
                if sums.get(name, expected[i]) != expected[i]:
                    raise StateError(
                        f"{(labels or self.labels)[i]}: tensor {name!r} is not what it was when the state was saved "
                        f"(then as {self.labels[i]}); the coefficients belong to the old candidates. Restore them, or "
                        "start a new run."
                    )

    def require_same_in(self, pods: Pods) -> None:
        """Check that all pods have the candidates of the first one. They may be on local disks. Collective.

        Raises:
            CandidateError: names the first tensor that differs; on every rank.
        """
        if pods.count == 1:  # each tensor was read once, by the ranks together
            return
        columns = dict(zip(self.shapes, self.checksums.T.tolist(), strict=True))
        other = first_difference(pods, columns)
        labels = pods.broadcast(self.labels)
        with pods.agree():
            if other is None:
                return
            assert isinstance(other.first, list)  # names and numbers were compared when the candidates were opened
            i = next(i for i, checksum in enumerate(columns[other.key]) if checksum != other.first[i])
            raise CandidateError(
                f"{self.labels[i]}: tensor {other.key!r} on {other.location} is not that of {labels[i]} on "
                f"{other.first_location}; give all pods the same candidates, in the same order."
            )

    def state_dict(self) -> dict[str, Any]:
        """Return the fingerprint as plain data."""
        return {"labels": list(self.labels), "shapes": dict(self.shapes), "checksums": self.checksums}


def fingerprint_of(
    labels: Sequence[str], shapes: dict[str, tuple[int, ...]], checksums: dict[str, torch.Tensor]
) -> Fingerprint:
    """Return the fingerprint with the checksums of tensors, (n,) each; tensors that this rank did not read have 0."""
    zeros = torch.zeros(len(labels), dtype=torch.int64)
    return Fingerprint(tuple(labels), shapes, torch.stack([checksums.get(name, zeros) for name in shapes], dim=1))
