"""`python -m requant`: the same as the `requant` command."""

from requant.cli import run

if __name__ == "__main__":
    run()
