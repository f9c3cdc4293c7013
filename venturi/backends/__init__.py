"""L3: what turns Regions into kernels. One folder a backend; `reference` is the meaning of every graph."""
