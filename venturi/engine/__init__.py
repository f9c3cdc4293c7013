"""L4: from a model to a Plan to a file, and back to something that runs."""
