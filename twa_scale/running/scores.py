"""The scores of several averages, the result of `RunningAverages.compare`."""


class Scores(dict[str, float]):
    """The scores by the name of the average, with a table as its text."""

    def add(self, name: str, score: float) -> None:
        """Add a score with a name, or with `name (2)` and so on if the name exists."""
        label, count = name, 1
        while label in self:
            label, count = f"{name} ({count + 1})", count + 1
        self[label] = score

    def __str__(self) -> str:
        width = max(map(len, self), default=0)
        return "\n".join(f"{name:<{width}}  {value:.6g}" for name, value in self.items())
