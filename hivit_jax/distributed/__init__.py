"""Multi-process runs: start-up, consistency checks, preemption and exit codes."""
