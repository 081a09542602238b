"""What the guides say of a 7B's needs, held against the formulas."""


def figures() -> list[dict]:
    """Rows of claim, says, formula gives, verdict."""
    return []
