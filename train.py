"""Train small language models that differ in attention alone, and compare them.

`python train.py --help` lists every flag.
"""

import signal
import sys

if __name__ == "__main__":
    try:
        from smollm.studies.commands import main
    except KeyboardInterrupt:
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        print("train.py: interrupted", file=sys.stderr)
        sys.exit(130)
    sys.exit(main())
