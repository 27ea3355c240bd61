"""Numbers of bytes as text."""


def size_text(nbytes: float) -> str:
    """Return a number of bytes as text, such as "1.2 MB" for 1234567."""
    for unit in ("B", "kB", "MB", "GB"):
        digits = 0 if unit == "B" else 1
        if abs(round(nbytes, digits)) < 1000:
            return f"{nbytes:.{digits}f} {unit}"
        nbytes /= 1000
    return f"{nbytes:.1f} TB"
