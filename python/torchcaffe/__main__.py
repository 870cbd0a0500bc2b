"""`python -m torchcaffe`: the command line tool, see cli.py."""
import sys

from torchcaffe.cli import main

if __name__ == "__main__":
    sys.exit(main())
