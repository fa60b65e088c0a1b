"""What scripts/bench_methods.py is made of."""
