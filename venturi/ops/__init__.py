"""L2: the operator table, one file per family. The torch references here are the meaning of every graph."""
