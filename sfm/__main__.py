"""``python -m sfm``: the command line, and what ``torchrun -m sfm`` starts."""

from sfm.cli import main

if __name__ == "__main__":
    main()
