"""Which weights are set to zero before, or while, a base is stored; one method a file."""
