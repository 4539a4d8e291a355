"""Measurements of speed, memory and size; each writes a JSON file to `benchmarks/results`. Nothing imports this."""
