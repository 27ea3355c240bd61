"""What `compare` returns."""


class Scores(dict[str, float]):
    """Numbers by the name of an average; its text is a table."""

    def __str__(self) -> str:
        width = max(map(len, self), default=0)
        return "\n".join(f"{name:<{width}}  {value:.6g}" for name, value in self.items())
