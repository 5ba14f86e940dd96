"""Move bytes to a destination and read its answer."""
