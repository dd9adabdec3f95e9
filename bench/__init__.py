"""Benchmarks: ``make bench-trainer`` (CPU, against plain TRL) and ``make bench-gpu`` (one GPU machine)."""
