"""The scores of several averages, the result of `RunningAverages.compare`."""


class Scores(dict[str, float]):
    """Numbers by the name of an average; its text is a table."""

    def add(self, name: str, score: float) -> None:
        """Add a number under a name, or under `name (2)` and so on where there is one."""
        label, count = name, 1
        while label in self:
            label, count = f"{name} ({count + 1})", count + 1
        self[label] = score

    def __str__(self) -> str:
        width = max(map(len, self), default=0)
        return "\n".join(f"{name:<{width}}  {value:.6g}" for name, value in self.items())
