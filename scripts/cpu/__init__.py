"""What scripts/bench_kernels.py measures on a CPU."""
