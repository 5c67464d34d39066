"""What a batch is made of: its grid, the jobs' processes, what the runs say together."""
