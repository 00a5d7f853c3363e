"""Programs to run by hand: checks on a GPU, broken runs, mutants, comparisons of versions."""
