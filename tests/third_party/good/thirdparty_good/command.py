"""A subcommand."""


def hello(name: str = "nobody") -> None:
    """Say hello."""
    print(f"hello {name}")
