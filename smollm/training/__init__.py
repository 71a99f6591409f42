"""One run: its configuration, its steps, what it measures."""
