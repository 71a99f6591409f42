"""Many runs: their order, the table, the plots and the report."""
