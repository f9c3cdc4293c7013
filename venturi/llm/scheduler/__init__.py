"""What each step computes: the token budget, the order of waiting requests, and who may be admitted."""
