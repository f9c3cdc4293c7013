"""The interpreter: graphs executed by the operator table's torch references."""
