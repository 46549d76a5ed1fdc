"""`python -m tunesmith` is `tunesmith`: for who has several Pythons, and for debuggers."""

from tunesmith.cli.app import main

if __name__ == "__main__":
    main()
