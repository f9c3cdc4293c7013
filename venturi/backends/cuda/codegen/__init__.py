"""From Regions to Triton source text, and from text to cubins."""
