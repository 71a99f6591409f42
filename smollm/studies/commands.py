"""train.py's command line; what is refused, or only asks for help, waits for no PyTorch."""

import sys
from collections.abc import Sequence
from contextlib import ExitStack

from smollm.studies import INTERRUPTED, OK, REFUSED
from smollm.studies.plan import check, parse
from smollm.training.interrupts import Interrupts
from smollm.training.torchrun import leading


def main(argv: Sequence[str] | None = None) -> int:
    """Run train.py's command line, by default the process's: `[study FILE | report] [flags]`.

    Returns:
        The exit status: 0, all runs finished and their results are written; 1, some run failed
        or diverged, or results could not be written; 2, the flags, the data or the output folder
        were refused, in a line on stderr, before any work; 130, interrupted.
    """
    ends_process = argv is None
    argv = list(sys.argv[1:] if argv is None else argv)
    with Interrupts(ends_process=ends_process) as interrupts, ExitStack() as held:
        try:
            with interrupts.released():
                if argv[:1] == ["report"]:
                    return _report(argv[1:])
                config = parse(argv)
                check(config)
                from smollm.studies import study

                world, corpus = study.begin(config, interrupts, held)
        except (ValueError, OSError) as error:
            if leading():
                print(f"train.py: {error}", file=sys.stderr)
            return REFUSED
        except KeyboardInterrupt:
            print("train.py: interrupted, no run had begun", file=sys.stderr)
            return INTERRUPTED
        return study.run_study(config, corpus, world, study.Output(), interrupts)


def _report(argv: Sequence[str]) -> int:
    from smollm.studies.join import write_joined
    from smollm.studies.study import Output, say, show

    console = Output()
    folder, runs = write_joined(argv)
    show(console, runs)
    say(console, f"Report in {folder}/")
    return OK
