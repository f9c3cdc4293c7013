"""What a repository can hold: one class a kind of model."""
