"""Entry point of `recsys` and of `python -m recsys2stage`: what needs no torch is answered without importing it."""

import sys


def main() -> None:
    from recsys2stage.cli.completion import answer

    if not answer(sys.argv[1:]):
        from recsys2stage.cli.main import main as run  # imports torch and polars

        run()


if __name__ == "__main__":
    main()
