"""Numbers of bytes as text."""


def size_text(nbytes: float) -> str:
    """Return a number of bytes as text, such as "1.2 MB" for 1234567."""
    for unit in ("B", "kB", "MB", "GB"):
        if abs(nbytes) < 1000:
            return f"{nbytes:.0f} B" if unit == "B" else f"{nbytes:.1f} {unit}"
        nbytes /= 1000
    return f"{nbytes:.1f} TB"
