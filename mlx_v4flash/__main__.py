"""`python -m mlx_v4flash`."""

from .cli import main

if __name__ == "__main__":
    main()
