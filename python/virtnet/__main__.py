"""``python -m virtnet`` is the command ``virtnet``."""

from virtnet.cli import main

if __name__ == "__main__":
    main()
