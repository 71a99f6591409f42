"""Train small language models that differ in attention alone, and compare them.

`python train.py --help` lists every flag.
"""

import sys

from smollm.studies.study import main

if __name__ == "__main__":
    sys.exit(main())
