"""Models: which weights are sparse, how they become so, what that costs."""
