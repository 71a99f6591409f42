"""Many runs: their order, the table, the plots and the report."""

OK, UNFINISHED, REFUSED, INTERRUPTED = 0, 1, 2, 130  # train.py's exit statuses
