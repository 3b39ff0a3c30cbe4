"""The full model becomes a subnetwork, in place."""
