"""The parts of scripts/gpu_acceptance.py: checks, benchmarks, a training run, memory proofs."""
