"""From measurements to a verdict: the frontier, the page, the table."""
