"""Studies: a grid of settings and seeds, trained and scored run by run, with paired differences between its cells."""
