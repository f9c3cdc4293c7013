"""Finds the configuration of a model that serves most under a latency limit: variants, search, report."""
