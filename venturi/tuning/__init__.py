"""L4: times candidate kernels on the machine and remembers the answers."""
