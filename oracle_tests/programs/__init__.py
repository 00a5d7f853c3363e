"""What is run by hand: checks that need a GPU, faults, mutants, comparisons of whole versions."""
