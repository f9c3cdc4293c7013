"""One file a family of Regions; each class is one way to compute them."""
