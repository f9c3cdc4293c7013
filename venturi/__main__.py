"""`python -m venturi` is the command line."""

from venturi.cli.main import main

main()
