import sys

from vit5gen.cli import main

if __name__ == "__main__":
    main(["sample", *sys.argv[1:]])
