"""Measuring a variant on an engine: quality, latency, memory, and the statistics that decide."""
