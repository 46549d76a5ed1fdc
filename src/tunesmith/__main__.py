"""Entry point for `python -m tunesmith`."""

from tunesmith.cli.app import main

if __name__ == "__main__":
    main()
