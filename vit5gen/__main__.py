"""``python -m vit5gen``."""

from vit5gen.cli import main

if __name__ == "__main__":
    main()
