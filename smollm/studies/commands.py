"""train.py's command line; what is refused, or only asks for help, waits for no PyTorch."""

import os
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from pkgutil import resolve_name

from smollm.studies import INTERRUPTED, OK, REFUSED
from smollm.studies.plan import check, parse
from smollm.training.interrupts import Interrupts
from smollm.training.torchrun import leading

# What is not a study, each MODULE:FUNCTION of this room, given its flags.
COMMANDS = {
    "report": "join:main",
    "sample": "sample:main",
    "evaluate": "evaluate:main",
    "export": "export:main",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run train.py's command line, by default the process's.

    `[study FILE] [flags]` is a study; the first word may also be one of `COMMANDS`.

    Returns:
        The exit status: 0, all was done, and all runs of a study finished; 1, some run failed or
        diverged, or results could not be written; 2, the flags, the data or a folder were refused,
        in a line on stderr, before any work; 130, interrupted.
    """
    ends_process = argv is None
    argv = list(sys.argv[1:] if argv is None else argv)
    command = COMMANDS.get(argv[0]) if argv else None
    with Interrupts(ends_process=ends_process) as interrupts, ExitStack() as held:
        try:
            with interrupts.released():
                if command is not None:
                    status: int = resolve_name(f"{__package__}.{command}")(argv[1:])
                    return status
                config = parse(argv)
                check(config)
                from smollm.studies import study

                world, corpus = study.begin(config, interrupts, held)
        except BrokenPipeError:  # what reads the output has read enough
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return OK
        except (ValueError, OSError) as error:
            if leading():
                print(f"train.py: {error}", file=sys.stderr)
            return REFUSED
        except KeyboardInterrupt:
            what = ", no run had begun" if command is None else ""
            print(f"train.py: interrupted{what}", file=sys.stderr)
            return INTERRUPTED
        return study.run_study(config, corpus, world, study.Output(), interrupts)
