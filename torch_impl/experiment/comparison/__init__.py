"""`losa compare`: a matrix of runs from a TOML file, resumable cell by cell, and the tables and curves of its results."""
