"""L6: the command line, one file a command. Nothing imports it."""
