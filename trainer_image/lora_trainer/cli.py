"""Command line of the trainer."""


def main() -> int:
    """Entry."""
    return 0
