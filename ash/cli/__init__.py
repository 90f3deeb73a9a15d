"""The command line: one file per group of commands, loaded only when one of its commands is called. Prints; decides nothing else."""
