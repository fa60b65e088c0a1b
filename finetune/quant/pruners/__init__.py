"""Which weights are set to zero, or which parts taken out, before, or while, a base is stored; one method a file."""
