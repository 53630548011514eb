"""`python -m smolmlx` is `smolmlx`."""

from smolmlx.cli import main

if __name__ == "__main__":
    main()
