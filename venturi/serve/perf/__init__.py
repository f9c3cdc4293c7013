"""Load on a server and what it answers: targets, generators, windows until the figures are stable."""
