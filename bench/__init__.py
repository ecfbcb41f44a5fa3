"""Benchmarks of pydl: `python bench/run.py` measures, `python bench/gpu.py` runs everything on a machine with a GPU."""
